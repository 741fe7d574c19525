"""Modules that the mixins put into a model."""

from lightning_tricks.layers.adapted import AdaptedLayer, adapted_layers
from lightning_tricks.layers.bottleneck import Block, Bottlenecks, Fusion
from lightning_tricks.layers.fast_path import leave_fast_path
from lightning_tricks.layers.lora_convolution import LoRAConv1d, LoRAConv2d, LoRAEmbedding
from lightning_tricks.layers.lora_linear import LoRALinear
from lightning_tricks.layers.low_rank import LowRank, LowRankLayer
from lightning_tricks.layers.packed import PackedLinear, PackedWeight, packed_layers
from lightning_tricks.layers.prompts import Prefix, Prompt, Prompts
from lightning_tricks.layers.scaled import ScaledLayer, ScaledLinear, Scaling
from lightning_tricks.layers.targets import Target, find_linears, find_targets

__all__ = [
    "AdaptedLayer",
    "Block",
    "Bottlenecks",
    "Fusion",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LowRank",
    "LowRankLayer",
    "PackedLinear",
    "PackedWeight",
    "Prefix",
    "Prompt",
    "Prompts",
    "ScaledLayer",
    "ScaledLinear",
    "Scaling",
    "Target",
    "adapted_layers",
    "find_linears",
    "find_targets",
    "leave_fast_path",
    "packed_layers",
]
