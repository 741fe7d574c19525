"""Which layers targets select, and what they are refused for."""

import pytest
import torch
from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import LoRALinear, find_linears


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(Attention() for _ in range(3))
        self.pooler = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query"], ["layer.0.query", "layer.1.query", "layer.2.query"]),
        (["pooler", "1.query"], ["layer.1.query", "pooler"]),
        (["layer.2.key"], ["layer.2.key"]),
        (["layer.[01].key", "key"], ["layer.0.key", "layer.1.key", "layer.2.key"]),
        (["layer.0.*"], ["layer.0.query", "layer.0.key"]),
    ],
)
def test_selects(targets, expected):
    assert list(find_linears(Encoder(), targets)) == expected


def test_a_star_is_every_linear_layer():
    assert len(find_linears(Encoder(), ["*"])) == 7


@pytest.mark.parametrize("targets", [["q_proj"], ["query", "q_proj"], ["layer.7.*"]])
def test_a_target_that_selects_nothing_is_refused_with_the_candidates(targets):
    with pytest.raises(
        MisconfigurationError, match=r"selects no layer of Encoder\..* query \(3\), key \(3\), pooler \(1\)"
    ):
        find_linears(Encoder(), targets)


def test_what_is_no_linear_layer_is_named_with_its_type():
    with pytest.raises(MisconfigurationError, match=r"'norm' selects `layer.0.norm`, a LayerNorm"):
        find_linears(Encoder(), ["norm"])
    with pytest.raises(MisconfigurationError, match="a LayerNorm"):
        find_linears(Encoder(), ["*.norm"])


def test_a_module_without_linear_layers():
    with pytest.raises(MisconfigurationError, match=r"holds no torch\.nn\.Linear"):
        find_linears(nn.Sequential(nn.ReLU()), ["query"])


@pytest.mark.parametrize("target", ["out_proj", "*"])
def test_the_projection_that_attention_never_calls_is_refused(target):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(MisconfigurationError, match=r"`self_attn\.out_proj` belongs to torch\.nn\.MultiheadAttention"):
        find_linears(layer, [target])
    assert list(find_linears(layer, ["linear*"])) == ["linear1", "linear2"]


def test_subclasses_with_ways_of_their_own_are_refused():
    class Masked(nn.Linear):
        def forward(self, x):
            return torch.relu(super().forward(x))

    with pytest.raises(MisconfigurationError, match="`0` is a Masked, a subclass"):
        find_linears(nn.Sequential(Masked(2, 2)), ["0"])
    assert list(find_linears(nn.Sequential(LoRALinear(2, 2)), ["0"])) == ["0"]
