"""A weight-decomposed linear layer (DoRA) as one operation, with a backward pass of its own."""

from typing import Any

import torch
from torch import Tensor

from lightning_tricks.functional.low_rank_linear import (
    affine,
    compute_dtype,
    narrowed,
    read_weight,
    refuse_second_derivative,
    updated_weight,
    weight_is_cheaper,
)
from lightning_tricks.functional.packed_weight import Packing

__all__ = ["dora_linear", "low_rank_row_norms"]

_BLOCK = 256  # rows of a sum of products taken at a time, so that the products need no large temporary
_SMALLEST_LENGTH = 1e-20
_SMALLEST_NORM = 1e-12


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
    exact = _exact(weight)
    small, wide = down.to(exact), up.to(exact)
    cross = down.to(weight.dtype).mm(weight.t()).to(exact)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
    squares = squares + (2 * scale) * (cross * wide).sum(0)
    squares = squares + scale**2 * (small.mm(small.t()).mm(wide) * wide).sum(0)
    norms: Tensor = squares.clamp_min(0).sqrt()
    return norms


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    magnitude: Tensor,
    scale: float,
    *,
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
    out: Tensor = _DoRALinear.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, down, up, magnitude, scale, transposed, compute, packing
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
        with torch.autocast(x.device.type, enabled=False):
            lengths = _not_zero(magnitude)
            factor = lengths / low_rank_row_norms(matrix.t(), down, up, scale).clamp_min(_SMALLEST_NORM)
        narrow = narrowed(x, small_down)
        if weight_is_cheaper(x, compute):
            updated = updated_weight(cast, small_down, small_up, scale, transposed=transposed)
            out = affine(x, (updated if transposed else updated.t()).mul_(factor), bias)
        else:
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
        x, weight, bias, down, up, _, factor, narrow = ctx.saved_tensors
        grad = grads[0].to(ctx.compute)
        with torch.autocast(grad.device.type, enabled=False):
            cast = read_weight(weight, ctx.packing, ctx.compute)
            matrix = cast.t() if ctx.transposed else cast
            small_down, small_up = down.to(grad.dtype), (up * (factor * ctx.scale)).to(grad.dtype)
            narrow_grad = narrowed(grad, small_up)
            grad_bias = grad.sum(0, dtype=_exact(grad)) if bias is not None else None
            grad_magnitude = _magnitude_gradient(ctx, grad, grad_bias, matrix)
            grad_x = grad_weight = None
            if ctx.needs_input_grad[0]:
                scaled = factor.to(grad.dtype)
                wide = x.shape[1] >= x.shape[0]
                grad_x = (grad * scaled).mm(matrix) if wide else grad.mm(matrix * scaled[:, None])
                grad_x.addmm_(narrow_grad, small_down)
            if ctx.needs_input_grad[1]:
                full = (grad * factor.to(grad.dtype)).t().mm(x)
                grad_weight = (full.t() if ctx.transposed else full).to(ctx.weight_dtype)
            grad_down = narrow_grad.t().mm(x).to(down.dtype)
            grad_up = (narrow.t().mm(grad).to(_exact(grad)) * (factor * ctx.scale)).to(up.dtype)
            if bias is not None and grad_bias is not None:
                grad_bias = grad_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, grad_down, grad_up, grad_magnitude, None, None, None, None


def _magnitude_gradient(ctx: Any, grad: Tensor, grad_bias: Tensor | None, matrix: Tensor) -> Tensor:
    """The sum over the batch of gradient times direction, which is (output - bias) / magnitude."""
    x, _, bias, _, up, magnitude, factor, narrow = ctx.saved_tensors
    lengths = _not_zero(magnitude)
    if ctx.remembered is not None and ctx.remembered[0]._version == ctx.remembered[1]:
        total = _sum_of_products(grad, ctx.remembered[0])
        if bias is not None and grad_bias is not None:
            total = total - grad_bias * bias
    else:
        out = x.mm(matrix.t())
        out = out.addmm(narrow, up.to(out.dtype), alpha=ctx.scale)
        total = _sum_of_products(grad, out) * factor
    return (total / lengths).to(magnitude.dtype)


def _sum_of_products(first: Tensor, second: Tensor) -> Tensor:
    """`(first * second).sum(0)` in fp32 or wider, without the product, which would be as large as the activations."""
    exact = _exact(first)
    if torch.compiler.is_compiling() or first.device.type != "cpu":
        return (first * second).sum(0, dtype=exact)
    total = torch.zeros(first.shape[1], dtype=exact)
    products = torch.empty(_BLOCK, first.shape[1], dtype=first.dtype)
    for start in range(0, first.shape[0], _BLOCK):
        one, two = first[start : start + _BLOCK], second[start : start + _BLOCK]
        total += torch.mul(one, two, out=products[: one.shape[0]]).sum(0, dtype=exact)
    return total


def _not_zero(magnitude: Tensor) -> Tensor:
    """A row of zeros has the length 0, by which its gradient cannot be divided."""
    lengths = magnitude.to(_exact(magnitude))
    return torch.where(lengths.abs() < _SMALLEST_LENGTH, _SMALLEST_LENGTH, lengths)


def _exact(tensor: Tensor) -> torch.dtype:
    """What sums over a tensor are taken in."""
    return torch.promote_types(tensor.dtype, torch.float32)
