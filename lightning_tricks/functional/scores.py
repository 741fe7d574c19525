"""Scores of a monitored metric: which direction is better, and whether one beats another."""

import math
import re
from collections.abc import Sequence
from typing import Literal

__all__ = ["infer_mode", "is_improvement", "rank_scores"]

_LOWER = re.compile(
    "bpb|bpc|brier|cer|ece|entropy|err|error|fid|hamming|kl|logloss|loss|mae|mape|mse|nll|perplexity|ppl|regret|rmse"
    "|smape|ter|wer"
)
_HIGHER = re.compile(
    "acc|accuracy|ap|auc|auprc|auroc|bleu|chrf|dice|f1|fbeta|iou|jaccard|kappa|map|mcc|meteor|miou|mrr|ndcg|pearson"
    "|precision|psnr|r2|recall|reward|rouge[12l]?|sensitivity|spearman|specificity|ssim"
)


def infer_mode(name: str) -> Literal["min", "max"] | None:
    """Whether a metric of this name is better low or high, told from the words in it.

    Args:
        name: a logged name, such as `val/loss` or `val_macro_f1`.

    Returns:
        `"min"` for losses and errors, `"max"` for scores, None for a name that says neither or both.

    Example:
        >>> from lightning_tricks.functional import infer_mode
        >>> infer_mode("val/loss"), infer_mode("val_macro_f1"), infer_mode("f1_loss")
        ('min', 'max', None)
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    lower, higher = any(map(_LOWER.fullmatch, words)), any(map(_HIGHER.fullmatch, words))
    if lower == higher:
        return None
    return "min" if lower else "max"


def is_improvement(score: float, best: float | None, *, mode: Literal["min", "max"], min_delta: float = 0.0) -> bool:
    """Whether `score` beats `best` by more than `min_delta`. A score that is not finite beats nothing.

    Args:
        score: the new value of the metric.
        best: the best value so far; None before the first.
        mode: `"min"` if lower is better, `"max"` if higher is.
        min_delta: how much better it must be, in the metric's unit; 0 or more.

    Example:
        >>> from lightning_tricks.functional import is_improvement
        >>> is_improvement(0.29, 0.30, mode="min"), is_improvement(0.29, 0.30, mode="min", min_delta=0.05)
        (True, False)
        >>> is_improvement(float("nan"), None, mode="min")
        False
    """
    if not math.isfinite(score):
        return False
    if best is None:
        return True
    return best - score > min_delta if mode == "min" else score - best > min_delta


def rank_scores(scores: Sequence[float], *, mode: Literal["min", "max"]) -> list[int]:
    """The positions of the scores, best first. Equal ones keep their order; one that is not finite is left out.

    Args:
        scores: values of one metric.
        mode: `"min"` if lower is better, `"max"` if higher is.

    Example:
        >>> from lightning_tricks.functional import rank_scores
        >>> rank_scores([0.3, float("nan"), 0.1, 0.3], mode="max")
        [0, 3, 2]
    """
    sign = 1 if mode == "min" else -1
    finite = [position for position, score in enumerate(scores) if math.isfinite(score)]
    return sorted(finite, key=lambda position: sign * scores[position])
