"""Callbacks: thin Lightning hooks, one trick a file."""

from lightning_tricks.callbacks._averaging_policies import EMA, LAWA, SWA, AveragingPolicy
from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm, Percentile, ZScore
from lightning_tricks.callbacks._combine_policies import CombinePolicy, GreedySoup, Predictions, Uniform, Weighted
from lightning_tricks.callbacks._gradient_policies import GradientPolicy, UnitwiseAdaptive, Value
from lightning_tricks.callbacks._member_policies import Cyclic, Every, LastK, MemberPolicy, TopK
from lightning_tricks.callbacks._norm_series import Suggestion
from lightning_tricks.callbacks._patience import Epochs, Patience, Seconds, Steps
from lightning_tricks.callbacks._watch import Watch
from lightning_tricks.callbacks.checkpoint_ensemble import CheckpointEnsemble
from lightning_tricks.callbacks.early_stopping import EarlyStopping
from lightning_tricks.callbacks.gradient_clipping import GradientClipping
from lightning_tricks.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_tricks.callbacks.non_finite_guard import NonFiniteGuard
from lightning_tricks.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "AveragingPolicy",
    "CheckpointEnsemble",
    "ClippingPolicy",
    "CombinePolicy",
    "Cyclic",
    "EMA",
    "EarlyStopping",
    "Epochs",
    "Every",
    "FixedNorm",
    "GradientClipping",
    "GradientNormMonitor",
    "GradientPolicy",
    "GreedySoup",
    "LAWA",
    "LastK",
    "MemberPolicy",
    "NonFiniteGuard",
    "Patience",
    "Percentile",
    "Predictions",
    "SWA",
    "Seconds",
    "Steps",
    "Suggestion",
    "TopK",
    "Uniform",
    "UnitwiseAdaptive",
    "Value",
    "Watch",
    "WeightAveraging",
    "Weighted",
    "ZScore",
]
