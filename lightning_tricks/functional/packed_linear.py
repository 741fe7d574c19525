"""A linear layer whose weight is in few bits, as one operation that keeps those bits alone for its backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tricks.functional.linear_parts import compute_dtype, refuse_second_derivative, without_autocast
from lightning_tricks.functional.packed_weight import Packing

__all__ = ["packed_linear"]


def packed_linear(x: Tensor, packed: Tensor, packing: Packing, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` in the precision of `x`, or of autocast, where `weight` is unpacked and dropped again.

    Args:
        x: inputs of shape (..., in_features).
        packed: what `pack_weight` made of a weight of shape (out_features, in_features).
        packing: what unpacks it.
        bias: of shape (out_features,), or None.

    Returns:
        A tensor of shape (..., out_features).

    Raises:
        UnsupportedError: in a backward pass with `create_graph=True`: there is no second derivative.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import pack_weight, packed_linear
        >>> packed_linear(torch.ones(1, 2), *pack_weight(torch.eye(2), "nf4"))
        tensor([[1., 1.]])
    """
    compute = compute_dtype(x, x)
    out: Tensor = _PackedLinear.apply(x.to(compute), packed, packing, bias)  # type: ignore[no-untyped-call]
    return out


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, packing: Packing, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.packing, ctx.compute, ctx.bias_dtype = packing, x.dtype, None if bias is None else bias.dtype
        return F.linear(x, packing.unpack(packed, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A packed layer")
        (packed,), grad = ctx.saved_tensors, grads[0].to(ctx.compute)
        grad_x = grad_bias = None
        with without_autocast(grad.device):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ ctx.packing.unpack(packed, ctx.compute)
            if ctx.needs_input_grad[3]:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias
