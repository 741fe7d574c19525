"""Mixins to subclass beside LightningModule."""

from lightning_tricks.mixins.class_weighted_loss import Balanced, ClassWeightedLossMixin
from lightning_tricks.mixins.lora import LoRA, LoRAMixin
from lightning_tricks.mixins.loss_normalization import LossNormalizationMixin

__all__ = ["Balanced", "ClassWeightedLossMixin", "LoRA", "LoRAMixin", "LossNormalizationMixin"]
