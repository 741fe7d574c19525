"""The average of one run: the copies that a policy keeps of this rank's shards."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.callbacks._averaging_policies import AveragingPolicy, Copies
from lightning_tricks.engines import Engine

__all__ = ["Average"]

Shards = dict[str, Tensor]


class Average:
    """Holds fp32 copies of this rank's shards, and hands out the average that they make up.

    Args:
        policy: how they are averaged.
        offload: whether they lie in the host's memory instead of beside the weights.
    """

    def __init__(self, policy: AveragingPolicy, offload: bool = False) -> None:
        self._policy = policy
        self._offload = offload
        self._names: list[str] = []
        self._copies: Copies = []
        self.updates = 0

    def update(self, engine: Engine) -> None:
        """Take in the weights as they are. Communicates nothing."""
        with torch.no_grad():
            shards = list(engine.named_shards())
            self._names = [shard.name for shard in shards]
            # With `offload` a step waits for this copy: it is what saves the device's memory.
            weights = [shard.values.cpu() if self._offload else shard.values for shard in shards]
            self._policy.update(self._copies, weights, self.updates)
        self.updates += 1

    def values(self) -> Shards:
        """The average, by name; not to be written to."""
        return dict(zip(self._names, self._policy.average(self._copies), strict=True))

    def keep(self, engine: Engine, checkpoint: dict[str, Any], name: str) -> None:
        """Put the copies into a checkpoint. Collective."""
        for index, copy in enumerate(self._copies):
            engine.keep_in_checkpoint(checkpoint, f"{name}#{index}", dict(zip(self._names, copy, strict=True)))

    @staticmethod
    def find(engine: Engine, checkpoint: Mapping[str, Any], name: str) -> list[Callable[[], Shards]]:
        """What reads the copies in a checkpoint, once the engine is live; empty if it holds none."""
        found: list[Callable[[], Shards]] = []
        while (read := engine.find_in_checkpoint(checkpoint, f"{name}#{len(found)}")) is not None:
            found.append(read)
        return found

    def load(self, readers: list[Callable[[], Shards]], updates: int) -> None:
        """Go on from what a checkpoint holds."""
        copies = [read() for read in readers]
        self._names = list(copies[0]) if copies else []
        self._copies = [[self._placed(copy[name]) for name in self._names] for copy in copies]
        self.updates = updates

    def drop(self) -> None:
        """Free the copies."""
        self._copies = []

    def nbytes(self) -> int:
        """The bytes of the copies on this rank."""
        return sum(tensor.nbytes for copy in self._copies for tensor in copy)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self._offload else tensor
