"""Data larger than memory, as numbered shards of numbered rows: the protocol, and what a reader holds."""

import abc
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from lightning_tricks.errors import DataError

__all__ = ["Block", "ShardedSource"]


class Rows(Protocol):
    """Rows that are made when they are asked for, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


class Block(NamedTuple):
    """Neighbouring rows of a shard that were read together, and the number of the first."""

    first: int
    samples: Rows


class ShardedSource(Dataset[Any], abc.ABC):
    """Rows in shards, of which a bounded number is held: the `dataset` and the `StreamingSampler` take one.

    Rows are numbered through the shards, and `source[n]` reads row n. What was read last is held, at least as many
    rows as the sampler jumps about in; each worker process holds its own. Subclass it for a format of your own: call
    `super().__init__` with the shards' sizes, and define `read` and `fingerprint`.

    Args:
        rows: of each shard, 1 or more.
        transform: makes a sample of a row; None leaves it as it is.

    Raises:
        DataError: if there is no row, or an empty shard.

    Example:
        >>> class Squares(ShardedSource):
        ...     def read(self, shard, row):
        ...         return Block(0, [(100 * shard + n) ** 2 for n in range(self.rows[shard])])
        ...     def fingerprint(self):
        ...         return "squares"
        >>> source = Squares([3, 2])
        >>> len(source), source[1], source[4]
        (5, 1, 10201)
    """

    def __init__(self, rows: Sequence[int] | np.ndarray, *, transform: Callable[[Any], Any] | None = None) -> None:
        self.rows = np.asarray(rows, np.int64)
        if not len(self.rows) or self.rows.min() < 1:
            raise DataError(f"A source needs shards of at least one row each, got {len(self.rows)} shards.")
        self.transform = transform
        self._stops = np.cumsum(self.rows)
        self._keep = 0
        self._held: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._process = os.getpid()

    @abc.abstractmethod
    def read(self, shard: int, row: int) -> Block:
        """The rows read together with this one. Mostly called for rising rows of a shard.

        Raises:
            DataError: if the shard is damaged, or has another number of rows than before. It names the shard.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """What tells other data apart, cheaply had, the same in every process: a resumed epoch needs the same."""

    def keep(self, rows: int) -> None:
        """Hold at least so many of the rows read last."""
        self._keep = max(self._keep, rows)

    def close(self) -> None:
        """Let go of what is open; another process calls it before it reads."""

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no row {index}: the source has {len(self)}.")
        shard = int(np.searchsorted(self._stops, index, side="right"))
        row = index - int(self._stops[shard] - self.rows[shard])
        block = self._block(shard, row)
        sample = block.samples[row - block.first]
        return sample if self.transform is None else self.transform(sample)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A batch's samples, read in the order in which they lie."""
        found = {index: self[index] for index in sorted(set(indices))}
        return [found[index] for index in indices]

    def __getstate__(self) -> dict[str, Any]:
        self.close()
        return {**self.__dict__, "_held": OrderedDict()}

    def _block(self, shard: int, row: int) -> Block:
        if self._process != os.getpid():  # a forked worker: an open file's position is its parent's as well
            self.close()
            self._process = os.getpid()
        for key in reversed(self._held):
            if key[0] == shard and key[1] <= row < key[1] + len(self._held[key].samples):
                self._held.move_to_end(key)
                return self._held[key]
        block = self.read(shard, row)
        self._held[shard, block.first] = block
        self._let_go()
        return block

    def _let_go(self) -> None:
        held = sum(len(block.samples) for block in self._held.values())
        while len(self._held) > 1:
            oldest = next(iter(self._held))
            held -= len(self._held[oldest].samples)
            if held < self._keep:
                return
            del self._held[oldest]
