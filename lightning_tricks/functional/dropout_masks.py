"""Masks of dropout, a byte an element, and products of what they leave: no masked copy of all activations is made."""

import torch
from torch import Tensor

__all__ = ["draw_mask", "masked_gradient", "masked_narrow"]

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
    narrow = x.new_empty(x.shape[0], small.shape[0])
    for part in _parts(x):
        narrow[part] = small.mm((x[part] * mask[part]).t()).t()
    return narrow


def masked_gradient(x: Tensor, mask: Tensor, narrow_grad: Tensor, small: Tensor, grad_x: Tensor | None) -> Tensor:
    """The gradient of `small` in `masked_narrow`, in fp32 or wider; that of `x` is added to `grad_x`, if there is one.

    Args:
        x: as above.
        mask: as above.
        narrow_grad: the gradient of what `masked_narrow` returned.
        small: as above.
        grad_x: of the shape of `x`.
    """
    gradient = torch.zeros(small.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for part in _parts(x):
        gradient += narrow_grad[part].t().mm(x[part] * mask[part])
        if grad_x is not None:
            grad_x[part].addcmul_(narrow_grad[part].mm(small), mask[part])
    return gradient


def _parts(rows: Tensor) -> list[slice]:
    if torch.compiler.is_compiling() or rows.device.type != "cpu":
        return [slice(None)]
    count = max(1, _PART // max(1, rows.shape[1]))
    return [slice(start, start + count) for start in range(0, rows.shape[0], count)]
