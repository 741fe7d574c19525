"""Averages of weights over time: exponential, equal, and of the latest few."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["ema_decay", "lerp_", "mean_of"]

_CAST = 2**24  # elements that are cast together: 64 MiB in fp32


def ema_decay(update: int, decay: float, warmup: float = 0.0) -> float:
    """The decay of one update: `min(decay, (1 + update) / (warmup + update))`, or `decay` without a warm-up.

    Args:
        update: the number of updates before this one, 1 or more; the first one copies the weights.
        decay: the decay that is reached in the end, in [0, 1).
        warmup: how slowly it is reached, above 1; 0 for at once.

    Example:
        >>> from lightning_tricks.functional import ema_decay
        >>> [round(ema_decay(update, 0.9, warmup=10), 2) for update in (1, 10, 100)]
        [0.18, 0.55, 0.9]
        >>> ema_decay(1, 0.9)
        0.9

    References:
        `tf.train.ExponentialMovingAverage(num_updates=...)`, whose warm-up is 10.
    """
    return min(decay, (1 + update) / (warmup + update)) if warmup else decay


def lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """Move each average towards its value, in place: `average += weight * (value - average)`.

    One call for all tensors, at the averages' own precision. Values of another precision are cast a few tensors at a
    time: besides the averages there are never more than 2^24 of their elements, or one tensor, at that precision.

    Args:
        averages: fp32 tensors.
        values: as many of the same shapes and devices.
        weight: in [0, 1].

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import lerp_
        >>> average = torch.tensor([1.0])
        >>> lerp_([average], [torch.tensor([3.0], dtype=torch.bfloat16)], 0.25)
        >>> average
        tensor([1.5000])
    """
    if averages and all(value.dtype == averages[0].dtype for value in values):
        torch._foreach_lerp_(list(averages), list(values), weight)
        return
    for group in _groups(averages, values):
        torch._foreach_lerp_(
            [average for average, _ in group], [value.to(average.dtype) for average, value in group], weight
        )


def _groups(averages: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pairs, as many at a time as have `_CAST` elements, and at least one."""
    group: list[tuple[Tensor, Tensor]] = []
    held = 0
    for pair in zip(averages, values, strict=True):
        if group and held + pair[0].numel() > _CAST:
            yield group
            group, held = [], 0
        group.append(pair)
        held += pair[0].numel()
    if group:
        yield group


def mean_of(members: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The equal mean of lists of tensors, as new tensors; in the members' order, so that it is the same bits again.

    Args:
        members: at least one list of fp32 tensors, all of the same shapes.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import mean_of
        >>> mean_of([[torch.tensor([1.0])], [torch.tensor([2.0])]])
        [tensor([1.5000])]
    """
    total = [tensor.clone() for tensor in members[0]]
    for member in members[1:]:
        if total:
            torch._foreach_add_(total, list(member))
    if total:
        torch._foreach_div_(total, float(len(members)))
    return total
