"""Mixins to subclass beside LightningModule."""

from lightning_tricks.mixins.adapter import AdapterMixin
from lightning_tricks.mixins.class_weighted_loss import Balanced, ClassWeightedLossMixin
from lightning_tricks.mixins.dora import DoRA
from lightning_tricks.mixins.lora import LoRA, LoRAMixin

__all__ = ["AdapterMixin", "Balanced", "ClassWeightedLossMixin", "DoRA", "LoRA", "LoRAMixin"]
