"""Callbacks: thin Lightning hooks, one trick a file."""

from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm, Percentile, ZScore
from lightning_tricks.callbacks._combine_policies import CombinePolicy, GreedySoup, Predictions, Uniform, Weighted
from lightning_tricks.callbacks._gradient_policies import GradientPolicy, UnitwiseAdaptive, Value
from lightning_tricks.callbacks._member_policies import Cyclic, Every, LastK, MemberPolicy, TopK
from lightning_tricks.callbacks._norm_series import Suggestion
from lightning_tricks.callbacks.checkpoint_ensemble import CheckpointEnsemble
from lightning_tricks.callbacks.early_stopping import EarlyStopping
from lightning_tricks.callbacks.gradient_clipping import GradientClipping
from lightning_tricks.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_tricks.callbacks.non_finite_guard import NonFiniteGuard
from lightning_tricks.callbacks.sequence_length_warmup import SequenceLengthWarmup

__all__ = [
    "CheckpointEnsemble",
    "ClippingPolicy",
    "CombinePolicy",
    "Cyclic",
    "EarlyStopping",
    "Every",
    "FixedNorm",
    "GradientClipping",
    "GradientNormMonitor",
    "GradientPolicy",
    "GreedySoup",
    "LastK",
    "MemberPolicy",
    "NonFiniteGuard",
    "Percentile",
    "Predictions",
    "SequenceLengthWarmup",
    "Suggestion",
    "TopK",
    "Uniform",
    "UnitwiseAdaptive",
    "Value",
    "Weighted",
    "ZScore",
]
