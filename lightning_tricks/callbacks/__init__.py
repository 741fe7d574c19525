"""Callbacks: thin Lightning hooks, one trick a file."""

from lightning_tricks.callbacks._averaging_policies import EMA, LAWA, SWA, AveragingPolicy
from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm, Percentile, ZScore
from lightning_tricks.callbacks._combine_policies import CombinePolicy, GreedySoup, Predictions, Uniform, Weighted
from lightning_tricks.callbacks._gradient_policies import GradientPolicy, UnitwiseAdaptive, Value
from lightning_tricks.callbacks._learning_rate_policies import (
    Constant,
    Cosine,
    InverseSquareRoot,
    LearningRatePolicy,
    Linear,
    WarmupStableDecay,
)
from lightning_tricks.callbacks._member_policies import Cyclic, Every, LastK, MemberPolicy, TopK
from lightning_tricks.callbacks._norm_series import Suggestion
from lightning_tricks.callbacks._patience import Epochs, Patience, Seconds, Steps
from lightning_tricks.callbacks._watch import Watch
from lightning_tricks.callbacks.batch_size_accumulation import BatchSizeAccumulation
from lightning_tricks.callbacks.checkpoint_ensemble import CheckpointEnsemble
from lightning_tricks.callbacks.early_stopping import EarlyStopping
from lightning_tricks.callbacks.gradient_clipping import GradientClipping
from lightning_tricks.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_tricks.callbacks.layerwise_unfreezing import LayerwiseUnfreezing
from lightning_tricks.callbacks.learning_rate_schedule import LearningRateSchedule
from lightning_tricks.callbacks.non_finite_guard import NonFiniteGuard
from lightning_tricks.callbacks.sequence_length_warmup import SequenceLengthWarmup
from lightning_tricks.callbacks.spike_recovery import SpikeRecovery
from lightning_tricks.callbacks.weight_averaging import WeightAveraging

__all__ = [
    "AveragingPolicy",
    "BatchSizeAccumulation",
    "CheckpointEnsemble",
    "ClippingPolicy",
    "CombinePolicy",
    "Constant",
    "Cosine",
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
    "InverseSquareRoot",
    "LAWA",
    "LastK",
    "LayerwiseUnfreezing",
    "LearningRatePolicy",
    "LearningRateSchedule",
    "Linear",
    "MemberPolicy",
    "NonFiniteGuard",
    "Patience",
    "Percentile",
    "Predictions",
    "SWA",
    "Seconds",
    "SequenceLengthWarmup",
    "SpikeRecovery",
    "Steps",
    "Suggestion",
    "TopK",
    "Uniform",
    "UnitwiseAdaptive",
    "Value",
    "WarmupStableDecay",
    "Watch",
    "WeightAveraging",
    "Weighted",
    "ZScore",
]
