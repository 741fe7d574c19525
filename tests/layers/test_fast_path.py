"""torch's fused encoder kernel must not go past adapters."""

import pytest
import torch
from torch import nn

from lightning_tricks.layers import LoRALinear, leave_fast_path


@pytest.mark.parametrize("adapt_layer", [0, 1])
def test_adapters_have_their_say_in_evaluation(adapt_layer):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).requires_grad_(False)
    x, padding = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [2]])
    linear = LoRALinear.extend(encoder.layers[adapt_layer].linear1, rank=2, alpha=4)
    leave_fast_path(encoder)
    nn.init.normal_(linear.lora_B)
    trained = encoder.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding])


def test_layers_without_an_adapter_keep_it():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    leave_fast_path(layer)
    assert layer.activation_relu_or_gelu == 1
