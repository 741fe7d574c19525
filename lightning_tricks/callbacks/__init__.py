"""Callbacks: thin Lightning hooks, one trick a file."""

from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm, Percentile, Value, ZScore
from lightning_tricks.callbacks.checkpoint_ensemble import CheckpointEnsemble, TopK
from lightning_tricks.callbacks.early_stopping import EarlyStopping
from lightning_tricks.callbacks.gradient_clipping import GradientClipping

__all__ = [
    "CheckpointEnsemble",
    "ClippingPolicy",
    "EarlyStopping",
    "FixedNorm",
    "GradientClipping",
    "Percentile",
    "TopK",
    "Value",
    "ZScore",
]
