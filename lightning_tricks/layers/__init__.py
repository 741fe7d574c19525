"""Modules that the mixins put into a model."""

from lightning_tricks.layers.fast_path import leave_fast_path
from lightning_tricks.layers.lora_linear import LoRALinear
from lightning_tricks.layers.targets import find_linears

__all__ = ["LoRALinear", "find_linears", "leave_fast_path"]
