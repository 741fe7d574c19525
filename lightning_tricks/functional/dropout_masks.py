"""Masks of dropout, a byte an element, and products of what they leave: no masked copy of all activations is made."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_tricks.functional.linear_parts import narrowed

__all__ = ["add_through_mask_", "draw_mask", "masked_gradient", "masked_narrow"]

_VALUES = 256  # of a byte: what the probability of dropout is rounded to
_PART = 1 << 17  # elements that are masked at a time: they and what they give stay in the cache of one core


def draw_mask(rows: Tensor, probability: float) -> tuple[Tensor | None, float]:
    """1 for each element that stays, and by what it is multiplied; (None, 1.0) if all of them stay.

    One draw of 64-bit numbers gives eight masks each. They are bytes: torch multiplies by bytes in half the time that
    it takes for booleans.

    Args:
        rows: of any shape.
        probability: of dropping an element, in [0, 1), rounded to a multiple of 1/256.
    """
    dropped = min(round(probability * _VALUES), _VALUES - 1)
    if not dropped:
        return None, 1.0
    words = torch.randint(-(2**63), 2**63 - 1, ((rows.numel() + 7) // 8,), dtype=torch.int64, device=rows.device)
    mask = (words.view(torch.uint8)[: rows.numel()] >= dropped).view(torch.uint8).view(rows.shape)
    return mask, _VALUES / (_VALUES - dropped)


def masked_narrow(x: Tensor, mask: Tensor, small: Tensor) -> Tensor:
    """`(x * mask) @ small.T`, of shape (rows, rank).

    Args:
        x: of shape (rows, width).
        mask: of the same shape.
        small: of shape (rank, width).
    """
    parts = [narrowed(one * stays, small) for one, stays in _in_parts(x, mask)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def masked_gradient(x: Tensor, mask: Tensor, narrow_grad: Tensor) -> Tensor:
    """`narrow_grad.T @ (x * mask)`, in fp32 or wider: the gradient of `small` above.

    Args:
        x: as above.
        mask: as above.
        narrow_grad: the gradient of what `masked_narrow` returned, of shape (rows, rank).
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(narrow_grad.shape[1], x.shape[1], dtype=exact, device=x.device)
    for one, stays, back in _in_parts(x, mask, narrow_grad):
        total += back.t().mm(one * stays)
    return total


def add_through_mask_(grad_x: Tensor, mask: Tensor, narrow_grad: Tensor, small: Tensor) -> None:
    """Add to `grad_x` the gradient of `x` above, `(narrow_grad @ small) * mask`.

    Args:
        grad_x: of the shape of `x`.
        mask: as above.
        narrow_grad: as above.
        small: as above.
    """
    for one, stays, back in _in_parts(grad_x, mask, narrow_grad):
        one.addcmul_(back.mm(small), stays)


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """As many rows of each as the cache of one core holds; all of them on other devices, and where a graph is made."""
    first = tensors[0]
    if torch.compiler.is_compiling() or first.device.type != "cpu" or first.numel() <= _PART:
        yield tensors
        return
    count = max(1, _PART // first.shape[1])
    for start in range(0, first.shape[0], count):
        yield tuple(each[start : start + count] for each in tensors)
