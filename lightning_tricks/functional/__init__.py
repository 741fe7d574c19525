"""Tensor arithmetic: tensors in, tensors out; no Trainer, no state."""

from lightning_tricks.functional.class_weights import balanced_weights, weighted_cross_entropy_sums
from lightning_tricks.functional.dora_linear import dora_linear, low_rank_row_norms
from lightning_tricks.functional.fingerprint import fingerprint, same_fingerprint
from lightning_tricks.functional.gradient_clipping import clip_coefficient
from lightning_tricks.functional.lora import low_rank_update
from lightning_tricks.functional.low_rank_linear import low_rank_linear
from lightning_tricks.functional.norm_statistics import NormMoments, percentile, remember_norm, zscore_limit
from lightning_tricks.functional.patterns import is_glob, path_matches
from lightning_tricks.functional.quantiles import QuantileSketch
from lightning_tricks.functional.quantization import (
    NF4,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)
from lightning_tricks.functional.scores import infer_mode, is_improvement, rank_scores

__all__ = [
    "NF4",
    "NormMoments",
    "QuantileSketch",
    "balanced_weights",
    "clip_coefficient",
    "dequantize_int4",
    "dequantize_int8",
    "dora_linear",
    "fingerprint",
    "infer_mode",
    "is_glob",
    "is_improvement",
    "low_rank_linear",
    "low_rank_row_norms",
    "low_rank_update",
    "path_matches",
    "percentile",
    "quantize_int4",
    "quantize_int8",
    "quantize_nf4",
    "rank_scores",
    "remember_norm",
    "same_fingerprint",
    "weighted_cross_entropy_sums",
    "zscore_limit",
]
