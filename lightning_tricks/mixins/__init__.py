"""Mixins to subclass beside LightningModule."""

from lightning_tricks.mixins.class_weighted_loss import Balanced, ClassWeightedLossMixin
from lightning_tricks.mixins.lora import LoRA, LoRAMixin

__all__ = ["Balanced", "ClassWeightedLossMixin", "LoRA", "LoRAMixin"]
