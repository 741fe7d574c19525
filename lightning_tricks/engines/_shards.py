"""One rank's part of a parameter's master weights, and where in the whole it lies."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Shard", "misfit"]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one trained parameter's master weights, as one stretch of the flattened whole.

    Args:
        name: the parameter's name in the plain module.
        values: the part, flat, at the master's precision. It may be the master itself: read it, copy it, and write with
            `put_shards` only.
        start: where in the flattened (row-major) whole it begins.
        shape: the shape of the whole.

    Example:
        >>> import torch
        >>> shard = Shard("head.weight", torch.zeros(4), start=8, shape=(3, 4))
        >>> shard.stop, shard.numel
        (12, 12)
    """

    name: str
    values: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Where in the flattened whole it ends."""
        return self.start + self.values.numel()

    @property
    def numel(self) -> int:
        """The number of elements of the whole."""
        return math.prod(self.shape)


def misfit(shards: Iterable[Shard], values: Mapping[str, Tensor]) -> str | None:
    """How `values` differ from what this rank holds; None if they fit.

    Example:
        >>> import torch
        >>> misfit([Shard("w", torch.zeros(4), 0, (4,))], {"w": torch.zeros(3)})
        '`w` has 3 elements, and this rank holds 4'
    """
    held = {shard.name: shard.values.numel() for shard in shards}
    for name in [*held, *values]:
        if name not in values:
            return f"`{name}` is absent"
        if name not in held:
            return f"`{name}` is not among this rank's shards"
        if values[name].numel() != held[name]:
            return f"`{name}` has {values[name].numel()} elements, and this rank holds {held[name]}"
    return None
