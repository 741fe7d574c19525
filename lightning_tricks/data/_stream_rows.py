"""An epoch's rows, shard after shard, in the order of a shuffle of shards: numbers only."""

from collections.abc import Iterator, Sequence

import numpy as np

from lightning_tricks.functional.batching import shuffled_indices
from lightning_tricks.functional.streaming import nearby_order

__all__ = ["RankRows", "ShardRows"]


class ShardRows:
    """Row `i` of the epoch, counted through the shuffled shards, as its number in the whole source.

    Args:
        sizes: rows of each shard.
        seed: of the shards' order; None leaves them as they are.
        chosen: numbers of the rows that there are, None for all.

    Example:
        >>> rows = ShardRows(np.array([2, 1, 3]), (0, 4))
        >>> len(rows), rows[np.arange(6)].tolist()
        (6, [2, 3, 4, 5, 0, 1])
    """

    def __init__(self, sizes: np.ndarray, seed: Sequence[int] | None, chosen: np.ndarray | None = None) -> None:
        turn = np.arange(len(sizes)) if seed is None else shuffled_indices(len(sizes), seed).astype(np.int64)
        first = np.cumsum(sizes) - sizes
        self._stops = np.cumsum(sizes[turn])
        self._shift = first[turn] - (self._stops - sizes[turn])
        self._chosen: np.ndarray | None = None
        if chosen is not None:
            place = np.empty_like(turn)
            place[turn] = np.arange(len(turn))
            shard = np.searchsorted(first, chosen, side="right") - 1
            self._chosen = chosen[np.lexsort((chosen, place[shard]))]

    def __len__(self) -> int:
        return int(self._stops[-1]) if self._chosen is None else len(self._chosen)

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        if self._chosen is not None:
            return np.asarray(self._chosen[at])
        return np.asarray(at + self._shift[np.searchsorted(self._stops, at, side="right")])


class RankRows:
    """One rank's contiguous part of an epoch's rows, shuffled over short distances, read from any place on.

    Args:
        rows: of the epoch.
        first: of the part.
        stop: behind its last.
        reach: how far a row may move.
        seed: of the shuffle, the rank's own; None leaves the rows as they are.
    """

    def __init__(self, rows: ShardRows, first: int, stop: int, reach: int, seed: Sequence[int] | None) -> None:
        self._rows = rows
        self._first, self._count = first, stop - first
        self._reach, self._seed = (0, (0,)) if seed is None else (reach, seed)
        self._at, self._held = -1, np.empty(0, np.int64)
        self._pieces: Iterator[np.ndarray] = iter(())

    def __len__(self) -> int:
        return self._count

    def take(self, start: int, stop: int) -> np.ndarray:
        """The numbers of the `start`-th to the `stop`-th row. Cheap in order; elsewhere it starts anew."""
        if start != self._at:
            self._pieces, self._held = nearby_order(self._count, self._reach, self._seed, start), self._held[:0]
        parts = [self._held]
        held = len(self._held)
        while held < stop - start:
            parts.append(next(self._pieces))
            held += len(parts[-1])
        found = np.concatenate(parts)
        self._at, self._held = stop, found[stop - start :]
        return self._rows[found[: stop - start] + self._first]
