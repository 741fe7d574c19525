"""DoRA with dropout as one operation: the base sees all inputs, what the adapter changes sees those that stay."""

from typing import Any

import torch
from torch import Tensor

from lightning_tricks.functional.dropout_masks import masked_gradient
from lightning_tricks.functional.linear_parts import (
    affine,
    narrowed,
    read_weight,
    refuse_second_derivative,
    through_rows,
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

__all__ = ["DroppedDoRA"]


class DroppedDoRA(torch.autograd.Function):
    """`x @ W.T + bias + larger * (f * (kept @ W.T + scale * kept @ down.T @ up) - kept @ W.T)`, `kept = x * mask`.

    `f` is the factor of each row, a constant in the backward pass. Inputs are two-dimensional. Two products with the
    weight in each direction, and a mask of a byte an element kept instead of `x * mask`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor,
        mask: Tensor,
        larger: float,
        scale: float,
        transposed: bool,
        packing: Packing | None,
    ) -> Tensor:
        """The output."""
        cast = read_weight(weight, packing, x.dtype)
        matrix = cast if transposed else cast.t()
        with without_autocast(x.device):
            factor = row_factor(magnitude, low_rank_row_norms(matrix.t(), down, up, scale))
            kept = x * mask
            narrow = narrowed(kept, down.to(x.dtype))
            plain = kept.mm(matrix)
            updated = torch.addmm(plain, narrow, up.to(x.dtype), alpha=scale)
            change = plain.neg_().addcmul_(updated, factor.to(x.dtype))
            out = affine(x, matrix, bias).add_(change, alpha=larger)
        kept_weight = cast if packing is None else weight
        ctx.save_for_backward(x, kept_weight, bias, down, up, magnitude, mask, factor, narrow, updated)
        ctx.larger, ctx.scale = larger, scale
        ctx.transposed, ctx.packing, ctx.weight_dtype = transposed, packing, weight.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each input that has one."""
        refuse_second_derivative("DoRA")
        x, weight, bias, down, up, magnitude, mask, factor, narrow, updated = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        with without_autocast(grad.device):
            cast = read_weight(weight, ctx.packing, x.dtype)
            matrix = cast.t() if ctx.transposed else cast
            share = factor * ctx.larger
            total, sums = column_sums(grad, updated, plain=ctx.needs_input_grad[2])
            small_down, small_up = down.to(x.dtype), (up * (share * ctx.scale)).to(x.dtype)
            narrow_grad = narrowed(grad, small_up)
            grad_x = grad_weight = None
            change = (share - ctx.larger).to(x.dtype)  # of the weight, row by row, before the two factors
            if ctx.needs_input_grad[0]:
                through = through_rows(grad, matrix, change).addmm_(narrow_grad, small_down)
                grad_x = grad.mm(matrix).addcmul_(through, mask)
            if ctx.needs_input_grad[1]:
                full = grad.t().mm(x) + (grad * change).t().mm(x * mask)
                grad_weight = (full.t() if ctx.transposed else full).to(ctx.weight_dtype)
            grad_down = masked_gradient(x, mask, narrow_grad).to(down.dtype)
            grad_up = (narrow.t().mm(grad).to(exact_dtype(grad)) * (share * ctx.scale)).to(up.dtype)
            grad_magnitude = (total * share / not_zero(magnitude)).to(magnitude.dtype)
            grad_bias = None if sums is None else sums.to(bias.dtype)
        return (
            grad_x, grad_weight, grad_bias, grad_down, grad_up, grad_magnitude, None, None, None, None, None,
        )  # fmt: skip
