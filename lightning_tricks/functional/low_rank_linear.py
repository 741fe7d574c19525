"""A linear layer and its low-rank update as one operation, with a backward pass of its own."""

from typing import Any

import torch
from torch import Tensor

from lightning_tricks.functional.dropout_masks import add_through_mask_, draw_mask, masked_gradient, masked_narrow
from lightning_tricks.functional.linear_parts import (
    affine,
    compute_dtype,
    narrowed,
    read_weight,
    refuse_second_derivative,
    updated_weight,
    weight_is_cheaper,
    without_autocast,
)
from lightning_tricks.functional.packed_weight import Packing

__all__ = ["low_rank_linear"]


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    transposed: bool = False,
    packing: Packing | None = None,
) -> Tensor:
    """`x @ weight.T + bias + scale * (dropped(x) @ down.T) @ up`, in the precision of the weight, or of autocast.

    The two small factors are cast to that precision, never the activations; their gradients come at their own.

    Args:
        x: inputs of shape (..., in_features).
        weight: of shape (out_features, in_features).
        bias: of shape (out_features,), or None.
        down: the first factor, `A` in the paper, of shape (rank, in_features).
        up: the second factor, the transpose of the paper's `B`, of shape (rank, out_features): stored that way, the
            product that gives its gradient reads both operands in the order of memory.
        scale: `alpha / rank` in the paper.
        dropout: probability of dropping an input of the update, in [0, 1): rounded to a multiple of 1/256, since the
            mask is drawn a byte an element; what is kept is scaled by what is really kept.
        transposed: whether `weight` has the shape (in_features, out_features), as in GPT-2.
        packing: of a weight in few bits, then of shape (out_features, in_features): it is unpacked for the forward
            pass and again for the backward pass, and not kept in between.

    Returns:
        A tensor of shape (..., out_features).

    Raises:
        UnsupportedError: in a backward pass with `create_graph=True`: there is no second derivative.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import low_rank_linear
        >>> low_rank_linear(torch.ones(1, 3), torch.eye(3), None, torch.ones(2, 3), torch.ones(2, 3), scale=0.5)
        tensor([[4., 4., 4.]])
    """
    compute = compute_dtype(x, weight if packing is None else x)
    rows = x.reshape(-1, x.shape[-1]).to(compute)  # outside the function: what follows may change the result in place
    mask, larger = draw_mask(rows, dropout)
    scale = scale * larger
    if not torch.compiler.is_compiling() and any(map(_is_transformed, (rows, weight, down, up))):
        # `torch.func` has no rule for a backward pass written by hand, and takes no operation in place here.
        kept, matrix = rows if mask is None else rows * mask, read_weight(weight, packing, compute)
        base = affine(rows, matrix if transposed else matrix.t(), bias)
        whole = base + scale * kept.mm(down.to(compute).t()).mm(up.to(compute))
        return whole.view(*x.shape[:-1], whole.shape[-1])
    out: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, down, up, mask, scale, transposed, compute, packing
    )
    return out.view(*x.shape[:-1], out.shape[-1])


def _is_transformed(tensor: Tensor) -> bool:
    """Whether `vmap`, or another transform of `torch.func`, is at work on it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


class _LowRankLinear(torch.autograd.Function):
    """Of two-dimensional inputs. Saves inputs, never its output, which may be overwritten."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        mask: Tensor | None,
        scale: float,
        transposed: bool,
        compute: torch.dtype,
        packing: Packing | None,
    ) -> Tensor:
        cast = read_weight(weight, packing, compute)
        small_down, small_up = down.to(compute), up.to(compute)
        narrow = None
        if mask is None and weight_is_cheaper(x, compute):
            matrix = updated_weight(cast, small_down, small_up, scale, transposed=transposed, own=packing is not None)
            out = affine(x, matrix if transposed else matrix.t(), bias)
        else:
            out = affine(x, cast if transposed else cast.t(), bias)
            narrow = narrowed(x, small_down) if mask is None else masked_narrow(x, mask, small_down)
            out.addmm_(narrow, small_up, alpha=scale)
        ctx.save_for_backward(x, cast if packing is None else weight, down, up, mask, narrow)
        ctx.scale, ctx.transposed, ctx.compute, ctx.packing = scale, transposed, compute, packing
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A low-rank adapter")
        x, weight, down, up, mask, narrow = ctx.saved_tensors
        grad = grads[0].to(ctx.compute)
        with without_autocast(grad.device):
            small_down, small_up = down.to(ctx.compute), up.to(ctx.compute)
            narrow_grad = narrowed(grad, small_up).mul_(ctx.scale)
            grad_x = grad_weight = grad_bias = None
            if ctx.needs_input_grad[0]:
                matrix = read_weight(weight, ctx.packing, ctx.compute)
                grad_x = grad.mm(matrix.t() if ctx.transposed else matrix)
                if mask is None:
                    grad_x.addmm_(narrow_grad, small_down)
                else:
                    add_through_mask_(grad_x, mask, narrow_grad, small_down)
            if ctx.needs_input_grad[1]:
                full = x.t().mm(grad) if ctx.transposed else grad.t().mm(x)
                grad_weight = full.to(ctx.dtypes[0])
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0).to(ctx.dtypes[1])
            if narrow is None:
                narrow = narrowed(x, small_down)
            grad_down = narrow_grad.t().mm(x) if mask is None else masked_gradient(x, mask, narrow_grad)
            grad_up = narrow.t().mm(grad).mul_(ctx.scale).to(up.dtype)
        return grad_x, grad_weight, grad_bias, grad_down.to(down.dtype), grad_up, None, None, None, None, None
