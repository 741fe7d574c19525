"""Norm and scaling of gradients, whole or sharded, without waiting for the device."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.functional import clip_coefficient

__all__ = [
    "clamp_values",
    "exceeds",
    "global_norm",
    "gradients_of",
    "group_norms",
    "multiply",
    "scale_to_norm",
    "sum_over_shards",
]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that the optimizer's parameters have, each once."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.grad for p in parameters if p.grad is not None]


def global_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The 2-norm over all elements on all ranks, fp32. Collective if some gradients are sharded.

    Shards' squares are summed in double precision, where no fp32 norm overflows.
    """
    if not gradients:
        return torch.zeros((), device=device)
    if not any(_is_sharded(gradient) for gradient in gradients):
        return _norm(gradients)
    squares = [
        sum_over_shards(_norm(group).double().square().to(device), group[0]) for group in _by_placement(gradients)
    ]
    return torch.stack(squares).sum().sqrt().float()


def group_norms(groups: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """The 2-norm of each group over all ranks, fp32, in one reduction. Collective if some gradients are sharded.

    Example:
        >>> group_norms([[torch.tensor([3.0, 4.0])], []], torch.device("cpu"))
        tensor([5., 0.])
    """
    total = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for alike in _by_placement(gradient for group in groups for gradient in group):
        members = {id(gradient) for gradient in alike}
        parts = [[gradient for gradient in group if id(gradient) in members] for group in groups]
        squares = [_norm(part).double().square().to(device) if part else total.new_zeros(()) for part in parts]
        total += sum_over_shards(torch.stack(squares), alike[0])
    return total.sqrt().float()


def scale_to_norm(gradients: Sequence[Tensor], norm: Tensor, limit: float | Tensor) -> None:
    """Scale gradients in place by `min(1, limit / norm)`; by 1 if the norm is not finite."""
    multiply(gradients, clip_coefficient(norm, limit).to(norm.dtype))


def multiply(gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    """Scale gradients in place.

    Example:
        >>> gradients = [torch.tensor([0.5, -3.0]), torch.empty(0)]
        >>> multiply(gradients, 2.0)
        >>> gradients[0]
        tensor([ 1., -6.])
    """
    parts = [_local(gradient) for gradient in gradients]
    if dense := [part for part in parts if not part.is_sparse]:
        near = factor.to(dense[0].device) if isinstance(factor, Tensor) else factor  # offloaded ones lie on the host
        torch._foreach_mul_(dense, near)
    for part in parts:
        if part.is_sparse:
            part.mul_(factor)


def clamp_values(gradients: Sequence[Tensor], limit: float, device: torch.device) -> Tensor:
    """Clamp gradients in place; 1 if an element on any rank was outside, else 0. Collective if some are sharded.

    Example:
        >>> gradients = [torch.tensor([0.5, -3.0]), torch.empty(0)]
        >>> clamp_values(gradients, 1.0, torch.device("cpu")), gradients[0]
        (tensor(1.), tensor([ 0.5000, -1.0000]))
    """
    outside = torch.zeros((), device=device)
    for alike in _by_placement(gradients):
        outside = outside + sum_over_shards(exceeds(alike, limit, device), alike[0])
    parts = [_local(gradient) for gradient in gradients]
    if dense := [part for part in parts if not part.is_sparse]:
        torch._foreach_clamp_min_(dense, -limit)
        torch._foreach_clamp_max_(dense, limit)
    for part in parts:
        if part.is_sparse:
            whole = part.coalesce()  # an index may occur twice: what counts is the sum
            values = whole.values().clamp(-limit, limit)
            part.copy_(torch.sparse_coo_tensor(whole.indices(), values, whole.shape, check_invariants=False))
    return (outside > 0).float()


def exceeds(gradients: Sequence[Tensor], limit: float, device: torch.device) -> Tensor:
    """1 on `device` if an element of this rank's parts is outside of `[-limit, limit]`, else 0."""
    parts = [_local(gradient) for gradient in gradients]
    dense = [part.coalesce().values() if part.is_sparse else part for part in parts]
    held = [part for part in dense if part.numel()]  # an empty shard has no largest element
    if not held:
        return torch.zeros((), device=device)
    largest = torch.stack(torch._foreach_norm(held, torch.inf, dtype=torch.float32))
    return (largest > limit).any().float().to(device)


def _by_placement(gradients: Iterable[Any]) -> list[list[Tensor]]:
    """Gradients laid out over the ranks alike, together."""
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        placement = (gradient.device_mesh, gradient.placements) if _is_sharded(gradient) else None
        groups.setdefault(placement, []).append(gradient)
    return list(groups.values())


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    parts = [_local(gradient) for gradient in gradients]
    dense = [part.coalesce().values() if part.is_sparse else part for part in parts]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense, 2, dtype=torch.float32)))
    return norm


def sum_over_shards(value: Tensor, like: Any) -> Tensor:
    """The sum of a value over the ranks that share a tensor out; the value itself if each holds it whole."""
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    layout = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    total: Tensor = DTensor.from_local(value, like.device_mesh, layout).full_tensor()
    return total


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
