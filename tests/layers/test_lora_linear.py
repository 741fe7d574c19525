"""LoRALinear: what it computes, and that it stays the linear layer that it was."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_tricks.functional import low_rank_linear
from lightning_tricks.layers import LoRALinear


def adapted(in_features=6, out_features=4, bias=True, dropout=0.0, dtype=torch.float32) -> LoRALinear:
    """A layer whose adapter is no longer at its start."""
    layer = LoRALinear.extend(nn.Linear(in_features, out_features, bias, dtype=dtype), rank=2, alpha=3, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_adapter_adds_exactly_nothing(bias):
    plain, x = nn.Linear(6, 4, bias), torch.randn(5, 6)
    expected = plain(x)
    layer = LoRALinear.extend(plain, rank=2, alpha=4)
    assert layer is plain
    assert torch.equal(layer(x), expected)


def test_equals_the_paper():
    layer, x = adapted(), torch.randn(5, 6)
    expected = x @ (layer.weight + 3 / 2 * layer.lora_B.t() @ layer.lora_A).t() + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_the_names_of_the_base_stay():
    assert list(adapted().state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


def test_constructing_equals_extending():
    torch.manual_seed(0)
    built = LoRALinear(6, 4, rank=2, alpha=3)
    torch.manual_seed(0)
    extended = LoRALinear.extend(nn.Linear(6, 4), rank=2, alpha=3)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), extended.parameters(), strict=True))


def test_resetting_starts_the_adapter_anew():
    layer = adapted()
    layer.reset_parameters()
    assert not layer.lora_B.any()
    assert layer.lora_A.any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: torch.load(_saved(layer), weights_only=False)])
def test_copies_and_files_compute_the_same(copied):
    layer, x = adapted(), torch.randn(5, 6)
    other = copied(layer)
    assert type(other) is LoRALinear
    assert torch.equal(other(x), layer(x))
    nn.init.zeros_(other.lora_B)
    assert not torch.equal(other(x), layer(x))


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def test_dropout_is_of_the_adapters_inputs_and_of_training_only():
    layer, x = adapted(dropout=0.5), torch.randn(5, 6)
    plain = F.linear(x, layer.weight, layer.bias)
    torch.manual_seed(1)
    identity = torch.eye(6)
    dropped = low_rank_linear(x, torch.zeros(6, 6), None, identity, identity, 1.0, dropout=0.5)
    assert set((dropped / x).unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), plain + 1.5 * dropped @ layer.lora_A.t() @ layer.lora_B)
    layer.eval()
    torch.testing.assert_close(layer(x), plain + 1.5 * x @ layer.lora_A.t() @ layer.lora_B)


def test_an_in_place_operation_may_follow():
    layer, x = adapted(), torch.randn(5, 6)
    kept = (layer.lora_A, layer.lora_B)
    in_place = torch.autograd.grad(F.relu(layer(x), inplace=True).sum(), kept)
    out_of_place = torch.autograd.grad(F.relu(layer(x)).sum(), kept)
    torch.testing.assert_close(in_place, out_of_place, rtol=0, atol=0)


def test_bf16_base_keeps_fp32_adapters():
    layer, x = adapted(dtype=torch.bfloat16), torch.randn(5, 6, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    out = layer(x)
    out.float().pow(2).sum().backward()
    exact = (
        x.double() @ (layer.weight.double() + 1.5 * (layer.lora_B.t() @ layer.lora_A).double()).t()
        + layer.bias.double()
    )
    assert out.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    layer, x = adapted(dtype=dtype), torch.randn(5, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.lora_B.grad.dtype == torch.float32


def test_says_what_it_is():
    assert "in_features=6, out_features=4, bias=True, rank=2, alpha=3, dropout=0" in repr(adapted())
