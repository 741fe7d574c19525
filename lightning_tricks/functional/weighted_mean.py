"""The weighted mean of tensors that come one after another."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["weighted_mean"]

_MANY = 64  # tensors, from which on sums are taken in double precision


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of floating-point tensors, each taken from the iterable only when it is its turn.

    Summed in fp32, or fp64 for more than 64 tensors and for fp64 ones, divided and rounded to the tensors' dtype once,
    so that half-precision ones neither overflow nor drift. Memory: the sum, and one tensor.

    Args:
        tensors: as many as there are weights, all of one shape and dtype.
        weights: 0 or more, with a sum above 0; they need not sum to 1.

    Returns:
        A new tensor of the tensors' dtype.

    Raises:
        ValueError: if there are more tensors than weights, or fewer.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import weighted_mean
        >>> weighted_mean([torch.tensor([1.0]), torch.tensor([4.0])], [2, 1])
        tensor([2.])
    """
    total, dtype = None, torch.float32
    for tensor, weight in zip(tensors, weights, strict=True):
        if total is None:
            dtype = tensor.dtype
            total = tensor.to(_wide(dtype, len(weights))) * weight
        else:
            total.add_(tensor, alpha=weight)
        del tensor  # before the next one is made
    if total is None:
        raise ValueError("there is nothing to take the mean of")
    return total.div_(sum(weights)).to(dtype)


def _wide(dtype: torch.dtype, count: int) -> torch.dtype:
    double = count > _MANY or dtype in (torch.float64, torch.complex128)
    if dtype.is_complex:
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32
