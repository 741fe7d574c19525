"""Callbacks: thin Lightning hooks, one trick a file."""

from lightning_tricks.callbacks._averaging_policies import EMA, LAWA, SWA, AveragingPolicy
from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm, Percentile, Value, ZScore
from lightning_tricks.callbacks._norm_series import Suggestion
from lightning_tricks.callbacks.checkpoint_ensemble import CheckpointEnsemble, TopK
from lightning_tricks.callbacks.early_stopping import EarlyStopping
from lightning_tricks.callbacks.gradient_clipping import GradientClipping
from lightning_tricks.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_tricks.callbacks.non_finite_guard import NonFiniteGuard
from lightning_tricks.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "AveragingPolicy",
    "CheckpointEnsemble",
    "ClippingPolicy",
    "EMA",
    "EarlyStopping",
    "FixedNorm",
    "GradientClipping",
    "GradientNormMonitor",
    "LAWA",
    "NonFiniteGuard",
    "Percentile",
    "SWA",
    "Suggestion",
    "TopK",
    "Value",
    "WeightAveraging",
    "ZScore",
]
