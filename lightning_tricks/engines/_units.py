"""Adaptive clipping of units, the rows of weights, wherever a rank's part of a tensor begins and ends."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tricks.functional import unit_coefficients

__all__ = ["Limits", "Stretch", "Units", "clip_whole_units", "cut", "share", "units_of"]


class Limits(NamedTuple):
    """How far a unit's gradient may go: `ratio` of its weights' norm, which counts as `floor` at least."""

    ratio: float
    floor: float


class Stretch(NamedTuple):
    """This rank's part of one parameter and of its gradient, both flat, and where in the flattened whole it begins.

    A rank without a part, or a parameter without a gradient, has an empty one: every rank counts the same units.
    """

    weight: Tensor
    gradient: Tensor
    start: int
    shape: tuple[int, ...]


def units_of(shape: Sequence[int]) -> tuple[int, int]:
    """How many units a parameter of this shape has, and how many elements each: a vector is one unit.

    Example:
        >>> units_of((8, 3, 5, 5)), units_of((8,)), units_of(())
        ((8, 75), (1, 8), (1, 1))
    """
    numel = math.prod(shape)
    units = shape[0] if len(shape) > 1 else 1
    return (units, numel // units) if numel else (0, 1)


def cut(values: Tensor, start: int, length: int) -> Iterator[tuple[Tensor, int]]:
    """A stretch of a flattened parameter as rows: what is left of a unit, whole units, the beginning of one.

    Args:
        values: the stretch; flat.
        start: where in the whole it begins.
        length: the elements of a unit.

    Yields:
        Views of shape (rows, elements), each with its first row's unit in the parameter.

    Example:
        >>> [(rows.tolist(), unit) for rows, unit in cut(torch.arange(2, 9), start=2, length=3)]
        [([[2]], 0), ([[3, 4, 5], [6, 7, 8]], 1)]
    """
    head = min(-start % length, values.numel())
    body = (values.numel() - head) // length * length
    parts = values.tensor_split((head, head + body))
    places = (start, start + head, start + head + body)
    for part, place, width in zip(parts, places, (head, length, parts[2].numel()), strict=True):
        if part.numel():
            yield part.view(-1, width), place // length


def clip_whole_units(parameters: Sequence[Any], limits: Limits, device: torch.device) -> tuple[Tensor, int]:
    """Clip the gradients of parameters of which this process holds every unit whole, in place.

    Returns:
        How many units were clipped, and how many there are, those without a gradient included.
    """
    total = sum(units_of(parameter.shape)[0] for parameter in parameters)
    trained = [p for p in parameters if p.grad is not None and p.numel()]
    if not trained:
        return torch.zeros((), device=device), total
    trained.sort(key=lambda parameter: parameter.ndim < 2)  # vectors last: they are many, small, and measured together
    gradients = [parameter.grad for parameter in trained]
    weights = _unit_norms([parameter.detach() for parameter in trained])
    factors = unit_coefficients(weights, _unit_norms(gradients), ratio=limits.ratio, floor=limits.floor)
    ends = itertools.accumulate(units_of(gradient.shape)[0] for gradient in gradients)
    own = factors.tensor_split(list(ends)[:-1])
    torch._foreach_mul_(gradients, [f.view(-1, *[1] * (g.ndim - 1)) for f, g in zip(own, gradients, strict=True)])
    return (factors < 1).sum().to(device), total


class Units:
    """The units of parameters that are cut over ranks, and by what factor each is to be scaled.

    Args:
        stretches: of every parameter, in the same order on every rank.
        limits: what is allowed.
        device: where ranks communicate.
        combine: sums over the ranks that share the parameters.
        scale: what the gradients are multiplied by.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        limits: Limits,
        device: torch.device,
        combine: Callable[[Tensor], Tensor],
        scale: float = 1.0,
    ) -> None:
        self._shapes = [units_of(stretch.shape) for stretch in stretches]
        counts = [units for units, _ in self._shapes]
        self._first = [sum(counts[:index]) for index in range(len(counts))]
        self.count = sum(counts)
        squares = torch.zeros(2, self.count, dtype=torch.float64, device=device)
        for row, parts in enumerate(([each.weight for each in stretches], [each.gradient for each in stretches])):
            self._add_squares(squares[row], parts, [each.start for each in stretches])
        weights, gradients = combine(squares).sqrt()  # one buffer: one communication
        self.factors = unit_coefficients(weights, gradients / scale, ratio=limits.ratio, floor=limits.floor)
        self.clipped = (self.factors < 1).sum()

    def scale(self, index: int, values: Tensor, start: int) -> None:
        """Multiply a stretch of the gradient of parameter `index` by its units' factors, in place."""
        for rows, unit in cut(values, start, self._shapes[index][1]):
            first = self._first[index] + unit
            rows.mul_(self.factors[first : first + len(rows)].to(rows).view(-1, 1))

    def _add_squares(self, total: Tensor, parts: Sequence[Tensor], starts: Sequence[int]) -> None:
        for index, (part, start) in enumerate(zip(parts, starts, strict=True)):
            for rows, unit in cut(part, start, self._shapes[index][1]):
                first = self._first[index] + unit
                total[first : first + len(rows)] += _norms([rows]).to(total).square()


def share(clipped: Sequence[tuple[Tensor, int]], device: torch.device) -> Tensor:
    """The share of units that were clipped, fp32; 0 without units.

    Example:
        >>> share([(torch.tensor(1), 3), (torch.tensor(0), 1)], torch.device("cpu"))
        tensor(0.2500)
    """
    total = sum(count for _, count in clipped)
    if not total:
        return torch.zeros((), device=device)
    return torch.stack([number.to(device) for number, _ in clipped]).sum().float() / total


def _unit_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each unit, fp32, of tensors of which vectors and numbers come last."""
    vectors = [tensor for tensor in tensors if tensor.ndim < 2]
    norms = [_norms([tensor for tensor in tensors if tensor.ndim > 1])] if len(vectors) < len(tensors) else []
    if vectors:
        norms.append(torch.stack(list(torch._foreach_norm(vectors, 2, dtype=torch.float32))))
    return torch.cat(norms)


def _norms(rows: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each row, one after the other, fp32."""
    norms = [torch.linalg.vector_norm(own, dim=tuple(range(1, own.ndim)), dtype=torch.float32) for own in rows]
    return torch.cat(norms)
