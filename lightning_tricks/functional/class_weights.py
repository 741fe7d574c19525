"""Class weights from counts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tricks.errors import MisconfigurationError

__all__ = ["balanced_weights", "checked_weights", "effective_number_weights", "inverse_square_root_weights"]


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
    return _finite(n.sum() / (len(n) * n), n)


def effective_number_weights(counts: Sequence[int] | Tensor, beta: float) -> Tensor:
    """Weights by the effective number of examples, `(1 - beta) / (1 - beta ** n_c)`, whose sum is K.

    Examples of a class overlap, so that each further one adds less: from equal weights (`beta` 0) to those inverse to
    the counts (`beta` towards 1).

    Args:
        counts: as for `balanced_weights`.
        beta: in [0, 1); the paper takes 0.9 to 0.9999.

    Returns:
        Weights of shape (K,), fp32, finite, above 0. A class without an example gets the largest of the others.

    Raises:
        MisconfigurationError: if `counts` or `beta` is none of that.

    Example:
        >>> from lightning_tricks.functional import effective_number_weights
        >>> effective_number_weights([50, 30, 20], 0.9)
        tensor([0.9459, 0.9827, 1.0713])

    References:
        Cui et al.: Class-balanced loss based on effective number of samples (CVPR 2019).
    """
    if not 0 <= beta < 1:
        raise MisconfigurationError(f"`beta` must be 0 or more and below 1, got {beta!r}: 0.999 is a good start.")
    n = _checked_counts(counts)
    weights = _finite((1 - beta) / (1 - beta**n), n)
    return weights * (len(n) / weights.sum())


def inverse_square_root_weights(counts: Sequence[int] | Tensor) -> Tensor:
    """Weights inverse to the square root of the counts, whose sum is K: half way to balance, and less noisy.

    Args:
        counts: as for `balanced_weights`.

    Returns:
        Weights of shape (K,), fp32, finite, above 0. A class without an example gets the largest of the others.

    Raises:
        MisconfigurationError: if `counts` is none of that.

    Example:
        >>> from lightning_tricks.functional import inverse_square_root_weights
        >>> inverse_square_root_weights([100, 25, 4])
        tensor([0.3750, 0.7500, 1.8750])

    References:
        Mahajan et al.: Exploring the limits of weakly supervised pretraining (ECCV 2018), which samples so.
    """
    n = _checked_counts(counts)
    weights = _finite(n.rsqrt(), n)
    return weights * (len(n) / weights.sum())


def checked_weights(weights: Sequence[float] | Tensor, classes: int) -> Tensor:
    """Weights that a user gives, fp32, of shape (K,).

    Raises:
        MisconfigurationError: unless they are as many as classes, finite and above 0.

    Example:
        >>> from lightning_tricks.functional.class_weights import checked_weights
        >>> checked_weights([1, 2.5], 2)
        tensor([1.0000, 2.5000])
    """
    try:
        given = torch.as_tensor(weights, device="cpu").to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisconfigurationError(f"`weights` must be numbers, one for each class, got {weights!r}.") from error
    if given.shape != (classes,):
        raise MisconfigurationError(f"`weights` must hold one for each of the {classes} classes, got {weights!r}.")
    if not bool((torch.isfinite(given) & (given > 0)).all()):
        raise MisconfigurationError(
            f"`weights` must be finite and above 0, got {weights!r}. To leave a class out, give its targets the value "
            "of `ignore_index`."
        )
    return given


def _finite(weights: Tensor, counts: Tensor) -> Tensor:
    present = counts > 0
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
