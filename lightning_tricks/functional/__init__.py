"""Tensor arithmetic: tensors in, tensors out; no Trainer, no state."""

from lightning_tricks.functional.class_weights import balanced_weights, weighted_cross_entropy_sums
from lightning_tricks.functional.cosine_restarts import cosine_restarts, cycle_ends
from lightning_tricks.functional.fingerprint import fingerprint, same_fingerprint
from lightning_tricks.functional.gradient_clipping import clip_coefficient
from lightning_tricks.functional.greedy_selection import Selection, greedy_selection
from lightning_tricks.functional.lora import low_rank_update
from lightning_tricks.functional.norm_statistics import NormMoments, percentile, remember_norm, zscore_limit
from lightning_tricks.functional.patterns import is_glob, path_matches
from lightning_tricks.functional.quantiles import QuantileSketch
from lightning_tricks.functional.scores import infer_mode, is_improvement, rank_scores
from lightning_tricks.functional.weighted_mean import weighted_mean

__all__ = [
    "NormMoments",
    "QuantileSketch",
    "Selection",
    "balanced_weights",
    "clip_coefficient",
    "cosine_restarts",
    "cycle_ends",
    "fingerprint",
    "greedy_selection",
    "infer_mode",
    "is_glob",
    "is_improvement",
    "low_rank_update",
    "path_matches",
    "percentile",
    "rank_scores",
    "remember_norm",
    "same_fingerprint",
    "weighted_cross_entropy_sums",
    "weighted_mean",
    "zscore_limit",
]
