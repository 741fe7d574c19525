"""A weight-decomposed linear layer (DoRA) as one operation, with a backward pass of its own."""

from typing import Any

import torch
from torch import Tensor

from lightning_tricks.functional.dropout_masks import draw_mask
from lightning_tricks.functional.dropped_dora import DroppedDoRA
from lightning_tricks.functional.linear_parts import (
    affine,
    compute_dtype,
    narrowed,
    read_weight,
    refuse_second_derivative,
    through_rows,
    updated_weight,
    weight_is_cheaper,
    without_autocast,
)
from lightning_tricks.functional.packed_weight import Packing
from lightning_tricks.functional.row_norms import (
    column_sums,
    exact_dtype,
    low_rank_row_norms,
    not_zero,
    row_factor,
)

__all__ = ["dora_linear"]


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    magnitude: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    transposed: bool = False,
    packing: Packing | None = None,
) -> Tensor:
    """`x @ W.T + bias`, where each row of `W` has the direction of `weight + scale * up.T @ down` and a trained length.

    As in section 4.3 of the paper, the norm by which rows are divided counts as a constant in the backward pass.

    Args:
        x: inputs of shape (..., in_features).
        weight: of shape (out_features, in_features).
        bias: of shape (out_features,), or None.
        down: of shape (rank, in_features).
        up: of shape (rank, out_features).
        magnitude: the rows' lengths, of shape (out_features,).
        scale: `alpha / rank`.
        dropout: probability of dropping an input of what differs from the plain layer, as in `low_rank_linear`.
        transposed: whether `weight` has the shape (in_features, out_features), as in GPT-2.
        packing: of a weight in few bits, as in `low_rank_linear`.

    Returns:
        A tensor of shape (..., out_features).

    Raises:
        UnsupportedError: in a backward pass with `create_graph=True`: there is no second derivative.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import dora_linear
        >>> down, up, length = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([3.0, 4.0])
        >>> dora_linear(torch.ones(1, 2), torch.eye(2), None, down, up, length, scale=1.0)
        tensor([[3., 4.]])

    References:
        Liu et al.: DoRA: Weight-decomposed low-rank adaptation (ICML 2024).
    """
    compute = compute_dtype(x, weight if packing is None else x)
    rows = x.reshape(-1, x.shape[-1]).to(compute)
    mask, larger = draw_mask(rows, dropout)
    if mask is None:
        out: Tensor = _DoRALinear.apply(  # type: ignore[no-untyped-call]
            rows, weight, bias, down, up, magnitude, scale, transposed, compute, packing
        )
    else:
        out = DroppedDoRA.apply(  # type: ignore[no-untyped-call]
            rows, weight, bias, down, up, magnitude, mask, larger, scale, transposed, packing
        )
    return out.view(*x.shape[:-1], out.shape[-1])


class _DoRALinear(torch.autograd.Function):
    """Of two-dimensional inputs. What it remembers of its output, it uses only if that was not overwritten."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        scale: float,
        transposed: bool,
        compute: torch.dtype,
        packing: Packing | None,
    ) -> Tensor:
        cast = read_weight(weight, packing, compute)
        matrix = cast if transposed else cast.t()
        small_down, small_up = down.to(compute), up.to(compute)
        narrow = narrowed(x, small_down)
        if weight_is_cheaper(x, compute):
            own = packing is not None
            updated = updated_weight(cast, small_down, small_up, scale, transposed=transposed, own=own)
            updated = updated if transposed else updated.t()
            factor = row_factor(magnitude, torch.linalg.vector_norm(updated, dim=0))
            out = affine(x, updated.mul_(factor), bias)
        else:
            with without_autocast(x.device):
                factor = row_factor(magnitude, low_rank_row_norms(matrix.t(), down, up, scale))
            out = x.mm(matrix).addmm_(narrow, small_up, alpha=scale).mul_(factor.to(compute))
            if bias is not None:
                out.add_(bias.to(compute))
        ctx.save_for_backward(x, cast if packing is None else weight, bias, down, up, magnitude, factor, narrow)
        ctx.scale, ctx.transposed, ctx.weight_dtype = scale, transposed, weight.dtype
        ctx.compute, ctx.packing = compute, packing
        # Not by `save_for_backward`, which would refuse an in-place activation after the layer.
        untracked = torch.compiler.is_compiling() or out.is_inference()
        ctx.remembered = None if untracked else (out.detach(), out._version)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("DoRA")
        x, weight, _, down, up, _, factor, narrow = ctx.saved_tensors
        grad = grads[0].to(ctx.compute)
        with without_autocast(grad.device):
            cast = read_weight(weight, ctx.packing, ctx.compute)
            matrix = cast.t() if ctx.transposed else cast
            small_down, small_up = down.to(grad.dtype), (up * (factor * ctx.scale)).to(grad.dtype)
            narrow_grad = narrowed(grad, small_up)
            grad_magnitude, grad_bias = _vector_gradients(ctx, grad, matrix)
            grad_x = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_x = through_rows(grad, matrix, factor.to(grad.dtype)).addmm_(narrow_grad, small_down)
            if ctx.needs_input_grad[1]:
                full = (grad * factor.to(grad.dtype)).t().mm(x)
                grad_weight = (full.t() if ctx.transposed else full).to(ctx.weight_dtype)
            grad_down = narrow_grad.t().mm(x).to(down.dtype)
            grad_up = (narrow.t().mm(grad).to(exact_dtype(grad)) * (factor * ctx.scale)).to(up.dtype)
        return grad_x, grad_weight, grad_bias, grad_down, grad_up, grad_magnitude, None, None, None, None


def _vector_gradients(ctx: Any, grad: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the magnitude, by the direction, which is (output - bias) / magnitude, and of the bias, if it is trained."""
    x, _, bias, _, up, magnitude, factor, narrow = ctx.saved_tensors
    if ctx.remembered is not None and ctx.remembered[0]._version == ctx.remembered[1]:
        total, plain = column_sums(grad, ctx.remembered[0], plain=bias is not None)
        if plain is not None:
            total = total - plain * bias
    else:
        out = x.mm(matrix.t()).addmm_(narrow, up.to(x.dtype), alpha=ctx.scale)
        total, plain = column_sums(grad, out, plain=ctx.needs_input_grad[2])
        total = total * factor
    grad_bias = plain.to(bias.dtype) if plain is not None and ctx.needs_input_grad[2] else None
    return (total / not_zero(magnitude)).to(magnitude.dtype), grad_bias
