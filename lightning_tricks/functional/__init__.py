"""Tensor arithmetic: tensors in, tensors out; no Trainer, no state."""

from lightning_tricks.functional.averaging import ema_decay, lerp_, mean_of
from lightning_tricks.functional.class_weights import balanced_weights, weighted_cross_entropy_sums
from lightning_tricks.functional.fingerprint import fingerprint, same_fingerprint
from lightning_tricks.functional.gradient_clipping import clip_coefficient
from lightning_tricks.functional.lora import low_rank_update
from lightning_tricks.functional.norm_statistics import NormMoments, percentile, remember_norm, zscore_limit
from lightning_tricks.functional.patterns import is_glob, path_matches
from lightning_tricks.functional.quantiles import QuantileSketch
from lightning_tricks.functional.scores import infer_mode, is_improvement, rank_scores

__all__ = [
    "NormMoments",
    "QuantileSketch",
    "balanced_weights",
    "clip_coefficient",
    "ema_decay",
    "fingerprint",
    "infer_mode",
    "is_glob",
    "is_improvement",
    "lerp_",
    "low_rank_update",
    "mean_of",
    "path_matches",
    "percentile",
    "rank_scores",
    "remember_norm",
    "same_fingerprint",
    "weighted_cross_entropy_sums",
    "zscore_limit",
]
