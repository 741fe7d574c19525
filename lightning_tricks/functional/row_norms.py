"""Norms of a weight's rows under a low-rank update, and the sums from which their gradients come."""

import torch
from torch import Tensor

__all__ = ["low_rank_row_norms"]

_BLOCK = 64  # rows of which sums are taken at a time: what they are added to stays in the cache
_SMALLEST_NORM = 1e-12
_SMALLEST_LENGTH = 1e-20


def low_rank_row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The 2-norm of each row of `weight + scale * up.T @ down`, in fp32 or wider, without making that matrix.

    Expanded: `|w|^2 + 2 s (A w) . b + s^2 b' (A A') b` for a row `w` of the weight and its column `b` of `up`.

    Args:
        weight: of shape (out_features, in_features).
        down: of shape (rank, in_features).
        up: of shape (rank, out_features).
        scale: of the update.

    Returns:
        A tensor of shape (out_features,).

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import low_rank_row_norms
        >>> low_rank_row_norms(torch.eye(2), torch.ones(1, 2), torch.tensor([[0.0, 2.0]]), scale=1.0)
        tensor([1.0000, 3.6056])
    """
    exact = exact_dtype(weight)
    small, wide = down.to(exact), up.to(exact)
    cross = down.to(weight.dtype).mm(weight.t()).to(exact)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
    squares = squares + (2 * scale) * (cross * wide).sum(0)
    squares = squares + scale**2 * (small.mm(small.t()).mm(wide) * wide).sum(0)
    norms: Tensor = squares.clamp_min(0).sqrt()
    return norms


def row_factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    """By what rows of these norms are multiplied to have these lengths."""
    return not_zero(magnitude) / norms.clamp_min(_SMALLEST_NORM)


def column_sums(first: Tensor, second: Tensor, *, plain: bool) -> tuple[Tensor, Tensor | None]:
    """`(first * second).sum(0)` and, if `plain`, `first.sum(0)`, in fp32 or wider, of two-dimensional tensors.

    On a CPU in one pass over a few rows at a time, without the product, which would be as large as the activations.
    """
    exact = exact_dtype(first)
    if torch.compiler.is_compiling() or first.device.type != "cpu":
        return (first * second).sum(0, dtype=exact), first.sum(0, dtype=exact) if plain else None
    products = torch.zeros(min(_BLOCK, first.shape[0]), first.shape[1], dtype=exact)
    sums = torch.zeros_like(products) if plain else None
    for start in range(0, first.shape[0], _BLOCK):
        one, two = (each[start : start + _BLOCK].to(exact) for each in (first, second))
        products[: one.shape[0]].addcmul_(one, two)
        if sums is not None:
            sums[: one.shape[0]].add_(one)
    return products.sum(0), None if sums is None else sums.sum(0)


def not_zero(magnitude: Tensor) -> Tensor:
    """A row of zeros has the length 0, by which its gradient cannot be divided."""
    lengths = magnitude.to(exact_dtype(magnitude))
    return torch.where(lengths.abs() < _SMALLEST_LENGTH, _SMALLEST_LENGTH, lengths)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over a tensor are taken in."""
    return torch.promote_types(tensor.dtype, torch.float32)
