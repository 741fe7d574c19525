"""Callbacks: thin Lightning hooks, one trick a file."""

from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm, Percentile, Value, ZScore
from lightning_tricks.callbacks._norm_series import Suggestion
from lightning_tricks.callbacks.checkpoint_ensemble import CheckpointEnsemble, TopK
from lightning_tricks.callbacks.early_stopping import EarlyStopping
from lightning_tricks.callbacks.gradient_clipping import GradientClipping
from lightning_tricks.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_tricks.callbacks.non_finite_guard import NonFiniteGuard
from lightning_tricks.callbacks.sequence_length_warmup import SequenceLengthWarmup

__all__ = [
    "CheckpointEnsemble",
    "ClippingPolicy",
    "EarlyStopping",
    "FixedNorm",
    "GradientClipping",
    "GradientNormMonitor",
    "NonFiniteGuard",
    "Percentile",
    "SequenceLengthWarmup",
    "Suggestion",
    "TopK",
    "Value",
    "ZScore",
]
