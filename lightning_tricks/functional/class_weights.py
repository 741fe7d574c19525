"""Class weights from counts, and the two sums of a class-weighted cross-entropy."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tricks.errors import MisconfigurationError

__all__ = ["balanced_weights", "weighted_cross_entropy_sums"]


def balanced_weights(counts: Sequence[int] | Tensor) -> Tensor:
    """Weights that give every class the same share of the loss: `n / (K * n_c)`, scikit-learn's "balanced".

    A class without an example, which the formula would give an infinite weight, gets the largest weight of the others.

    Args:
        counts: examples per class in the training set, of shape (K,), K at least 2: whole numbers of 0 or
            more, not all 0.

    Returns:
        Weights of shape (K,), fp32, finite, above 0.

    Raises:
        MisconfigurationError: if `counts` is none of that.

    Example:
        >>> from lightning_tricks.functional import balanced_weights
        >>> balanced_weights([50, 30, 20])
        tensor([0.6667, 1.1111, 1.6667])
        >>> balanced_weights([60, 40, 0])
        tensor([0.5556, 0.8333, 0.8333])

    References:
        King, Zeng: Logistic regression in rare events data (Political Analysis, 2001).
    """
    n = _checked_counts(counts)
    weights = n.sum() / (len(n) * n)
    present = n > 0
    # `torch.tensor` and its kin may be told to make bf16 while an engine builds a model; `.to` may not.
    return torch.where(present, weights, weights[present].max()).to(torch.float32)


def _checked_counts(counts: Sequence[int] | Tensor) -> Tensor:
    remedy = "pass the examples per class in the training set, such as [7403, 5405, 1097]"
    try:
        n = torch.as_tensor(counts, device="cpu").to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationError(f"`counts` must be numbers, got {counts!r}: {remedy}.") from error
    if n.ndim != 1 or len(n) < 2:
        raise MisconfigurationError(
            f"`counts` must hold one count for each of 2 classes or more, got {counts!r}: {remedy}."
        )
    if not bool(torch.isfinite(n).all()) or bool((n < 0).any()) or bool((n != n.round()).any()):
        raise MisconfigurationError(f"`counts` must be whole numbers of 0 or more, got {counts!r}: {remedy}.")
    if not bool(n.any()):
        raise MisconfigurationError(f"`counts` are all 0, got {counts!r}: {remedy}.")
    return n


def weighted_cross_entropy_sums(
    logits: Tensor, targets: Tensor, weights: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the class-weighted mean cross-entropy, as `F.cross_entropy` defines it.

    Their quotient is `F.cross_entropy(logits, targets, weight=weights)`. Over several ranks or micro-batches, the
    exact mean is the sum of the numerators over the sum of the denominators, not a mean of means. Computed in fp32
    whatever the precision of the logits.

    Args:
        logits: scores of shape (N, K, ...), of any floating precision.
        targets: class indices of shape (N, ...), in [0, K) or equal to `ignore_index`.
        weights: one weight per class, of shape (K,), above 0.
        ignore_index: the target that is left out of both sums.

    Returns:
        The weighted sum of losses (with gradient) and the sum of the weights of the targets (without), both fp32 and
        zero-dimensional. With no valid target both are 0, and the first still has a gradient of zeros.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import weighted_cross_entropy_sums
        >>> logits, targets = torch.zeros(3, 2), torch.tensor([0, 1, -100])
        >>> weighted_cross_entropy_sums(logits, targets, torch.tensor([1.0, 3.0]))
        (tensor(2.7726), tensor(4.))
    """
    with torch.autocast(logits.device.type, enabled=False):
        weights = weights.detach().to(logits.device, torch.float32)
        numerator = F.cross_entropy(logits.float(), targets, weight=weights, reduction="sum", ignore_index=ignore_index)
    valid = targets != ignore_index
    denominator = (weights[targets.masked_fill(~valid, 0)] * valid).sum()
    return numerator, denominator
