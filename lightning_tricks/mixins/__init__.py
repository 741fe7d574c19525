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
from lightning_tricks.mixins._footprint import TrainableReport, trainable_report
from lightning_tricks.mixins.adapter import AdapterMixin
from lightning_tricks.mixins.bitfit import BitFit
from lightning_tricks.mixins.bottleneck import AdapterFusion, Bottleneck
from lightning_tricks.mixins.class_weighted_loss import ClassWeightedLossMixin
from lightning_tricks.mixins.dora import DoRA
from lightning_tricks.mixins.ia3 import IA3
from lightning_tricks.mixins.lora import LoRA, LoRAMixin
from lightning_tricks.mixins.loss_normalization import LossNormalizationMixin
from lightning_tricks.mixins.prompts import PrefixTuning, PromptTuning

__all__ = [
    "AdapterFusion",
    "AdapterMixin",
    "Balanced",
    "BitFit",
    "Bottleneck",
    "ClassLoss",
    "ClassRow",
    "ClassWeightedLossMixin",
    "ClassWeights",
    "CrossEntropy",
    "DoRA",
    "EffectiveNumber",
    "ExplicitWeights",
    "Focal",
    "IA3",
    "InverseSquareRoot",
    "LoRA",
    "LoRAMixin",
    "LogitAdjusted",
    "LossNormalizationMixin",
    "PrefixTuning",
    "PromptTuning",
    "TrainableReport",
    "trainable_report",
]
