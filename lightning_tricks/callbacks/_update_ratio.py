"""How far a step moves the weights, relative to the weights: from a copy of this rank's part of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_tricks.engines import Engine

__all__ = ["UpdateRatio"]


class UpdateRatio:
    """The ratio of the norm of a step's update to that of the weights before it, for the whole and for groups.

    Args:
        engine: whose weights.
        groups: parameter names by group.
    """

    def __init__(self, engine: Engine, groups: Mapping[str, Sequence[str]]) -> None:
        self._engine = engine
        self._groups = {group: set(names) for group, names in groups.items()}
        self._before = {shard.name: shard.values.clone() for shard in engine.named_shards()}

    def after_step(self) -> dict[str, Tensor]:
        """The ratios, as zero-dimensional tensors that are the same on every rank. Collective: one sum.

        A number that several ranks hold counts once for each in both norms, which leaves their ratio as it is.
        """
        shards = [shard for shard in self._engine.named_shards() if shard.values.numel()]
        names = [shard.name for shard in shards]
        before = [self._before[name] for name in names]
        moved = torch._foreach_sub([shard.values for shard in shards], before) if shards else []
        squares = torch.stack([_squares(moved), _squares(before)]) if shards else torch.zeros(2, 0)
        members = [list(range(len(names)))]
        members += [[index for index, name in enumerate(names) if name in own] for own in self._groups.values()]
        sums = torch.stack([squares[:, own].sum(1) for own in members], 1)
        moved_squares, held = self._engine.sum_over_ranks(sums)
        ratios = (moved_squares / held).sqrt()
        return dict(zip(["total", *self._groups], ratios.unbind(), strict=True))


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).square()
