"""Mixins to subclass beside LightningModule."""

from lightning_tricks.mixins._class_losses import ClassLoss, CrossEntropy, Focal, LogitAdjusted
from lightning_tricks.mixins._class_report import ClassRow
from lightning_tricks.mixins._class_weights import (
    Balanced,
    ClassWeights,
    EffectiveNumber,
    ExplicitWeights,
    InverseSquareRoot,
)
from lightning_tricks.mixins.class_weighted_loss import ClassWeightedLossMixin
from lightning_tricks.mixins.lora import LoRA, LoRAMixin
from lightning_tricks.mixins.loss_normalization import LossNormalizationMixin

__all__ = [
    "Balanced",
    "ClassLoss",
    "ClassRow",
    "ClassWeightedLossMixin",
    "ClassWeights",
    "CrossEntropy",
    "EffectiveNumber",
    "ExplicitWeights",
    "Focal",
    "InverseSquareRoot",
    "LoRA",
    "LoRAMixin",
    "LogitAdjusted",
    "LossNormalizationMixin",
]
