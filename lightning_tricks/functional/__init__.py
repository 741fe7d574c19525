"""Tensor arithmetic: tensors in, tensors out; no Trainer, no state."""

from lightning_tricks.functional.averaging import ema_decay, lerp_, mean_of
from lightning_tricks.functional.class_losses import (
    class_loss_sums,
    log_prior,
    two_class_logits,
    weighted_cross_entropy_sums,
)
from lightning_tricks.functional.class_weights import (
    balanced_weights,
    checked_weights,
    effective_number_weights,
    inverse_square_root_weights,
)
from lightning_tricks.functional.cosine_restarts import cosine_restarts, cycle_ends
from lightning_tricks.functional.dora_linear import dora_linear
from lightning_tricks.functional.fingerprint import fingerprint, same_fingerprint
from lightning_tricks.functional.gradient_clipping import clip_coefficient, unit_coefficients
from lightning_tricks.functional.greedy_selection import Selection, greedy_selection
from lightning_tricks.functional.learning_rates import (
    cosine_decay,
    inverse_square_root,
    linear_decay,
    linear_warmup,
    stable_decay,
)
from lightning_tricks.functional.lora import low_rank_update
from lightning_tricks.functional.loss_sums import per_maximum_length, per_sequence, per_token
from lightning_tricks.functional.low_rank_linear import low_rank_linear
from lightning_tricks.functional.norm_statistics import NormMoments, percentile, remember_norm, zscore_limit
from lightning_tricks.functional.packed_linear import packed_linear
from lightning_tricks.functional.packed_weight import Packing, pack_weight
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
from lightning_tricks.functional.robust import robust_zscore
from lightning_tricks.functional.row_norms import low_rank_row_norms
from lightning_tricks.functional.scores import infer_mode, is_improvement, rank_scores
from lightning_tricks.functional.weighted_mean import weighted_mean

__all__ = [
    "NF4",
    "NormMoments",
    "Packing",
    "QuantileSketch",
    "Selection",
    "balanced_weights",
    "checked_weights",
    "class_loss_sums",
    "clip_coefficient",
    "cosine_decay",
    "cosine_restarts",
    "cycle_ends",
    "dequantize_int4",
    "dequantize_int8",
    "dora_linear",
    "effective_number_weights",
    "ema_decay",
    "fingerprint",
    "greedy_selection",
    "infer_mode",
    "inverse_square_root",
    "inverse_square_root_weights",
    "is_glob",
    "is_improvement",
    "lerp_",
    "linear_decay",
    "linear_warmup",
    "log_prior",
    "low_rank_linear",
    "low_rank_row_norms",
    "low_rank_update",
    "mean_of",
    "pack_weight",
    "packed_linear",
    "path_matches",
    "per_maximum_length",
    "per_sequence",
    "per_token",
    "percentile",
    "quantize_int4",
    "quantize_int8",
    "quantize_nf4",
    "rank_scores",
    "remember_norm",
    "robust_zscore",
    "same_fingerprint",
    "stable_decay",
    "two_class_logits",
    "unit_coefficients",
    "weighted_cross_entropy_sums",
    "weighted_mean",
    "zscore_limit",
]
