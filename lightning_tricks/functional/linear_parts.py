"""What the kernels of linear layers share: precision, refusals, and the order in which products cost least."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lightning_tricks.errors import UnsupportedError
from lightning_tricks.functional.packed_weight import Packing

__all__ = [
    "affine",
    "compute_dtype",
    "narrowed",
    "read_weight",
    "refuse_second_derivative",
    "through_rows",
    "updated_weight",
    "weight_is_cheaper",
    "without_autocast",
]

_CACHED = 1 << 19  # elements of fp32 that the cache of one core holds


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What torch's own linear layer would compute in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def read_weight(weight: Tensor, packing: Packing | None, dtype: torch.dtype) -> Tensor:
    """A weight at a precision, unpacked if it is in few bits."""
    return weight.to(dtype) if packing is None else packing.unpack(weight, dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off. To say so where it is off costs as much as a small product."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def refuse_second_derivative(name: str) -> None:
    """Raise in a backward pass that is itself to be differentiated.

    Raises:
        UnsupportedError: naming the operation.
    """
    if torch.is_grad_enabled():
        raise UnsupportedError(
            name,
            "`create_graph=True`",
            "its backward pass is written by hand and has no derivative",
            "differentiate once, or merge the adapter and differentiate the plain layer",
        )


def weight_is_cheaper(rows: Tensor, compute: torch.dtype) -> bool:
    """Whether a pass over the weight costs less than one over the product of `rows` with it; in bf16 it would round."""
    return compute == torch.float32 and rows.shape[1] < rows.shape[0]


def updated_weight(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, *, transposed: bool, own: bool = False
) -> Tensor:
    """`weight + scale * up.T @ down` in the layout of the weight: to copy one into the other takes twice as long.

    Args:
        weight: as in `low_rank_linear`, unpacked.
        down: as there, in the weight's precision.
        up: as there, in the weight's precision.
        scale: as there.
        transposed: as there.
        own: whether the weight is nobody else's, and may become the result.
    """
    first, second = (down.t(), up) if transposed else (up.t(), down)
    return weight.addmm_(first, second, alpha=scale) if own else torch.addmm(weight, first, second, alpha=scale)


def narrowed(rows: Tensor, small: Tensor) -> Tensor:
    """`rows @ small.T`, (rows, rank), in the order of factors that takes a CPU less time, by up to a half."""
    if rows.dtype == torch.float32 and rows.numel() <= _CACHED:
        return small.mm(rows.t()).t()
    return rows.mm(small.t())


def affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ matrix + bias`."""
    return x.mm(matrix) if bias is None else torch.addmm(bias.to(x.dtype), x, matrix)


def through_rows(grad: Tensor, matrix: Tensor, factor: Tensor) -> Tensor:
    """`grad @ (factor[:, None] * matrix)`; the smaller of the two is multiplied by the factor."""
    if matrix.shape[1] >= grad.shape[0]:
        return (grad * factor).mm(matrix)
    return grad.mm(matrix * factor[:, None])
