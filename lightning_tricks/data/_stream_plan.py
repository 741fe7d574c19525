"""An epoch of a stream as steps: each rank sorts pools of its own rows, and all cut them into equally many batches."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_tricks.data._stream_rows import RankRows
from lightning_tricks.functional.batching import cut_steps, shuffled_indices, split_steps

__all__ = ["Pools", "StreamPlan", "fixed_pools", "pools_within", "spread"]


@dataclasses.dataclass(frozen=True)
class Pools:
    """How an epoch is divided into pools of batches.

    Args:
        bounds: of shape (ranks, pools + 1): where in a rank's rows each pool starts, and where the last one stops.
        steps: of each pool.
        batch_bounds: the same of each batch; None: batches go by the budget.
        budget: what no batch's samples times its longest exceed then.
    """

    bounds: np.ndarray
    steps: np.ndarray
    batch_bounds: np.ndarray | None = None
    budget: int = 0


class StreamPlan:
    """The steps of an epoch, or of what is left of it. Rows come in pools, and so does what a reader must hold.

    Args:
        ranks: the rows of each rank.
        pools: how they are divided.
        costs: padded lengths by row number, to sort pools by; None: no sorting.
        seed: of the order of a pool's batches; None: the longest first.
    """

    def __init__(
        self, ranks: Sequence[RankRows], pools: Pools, costs: np.ndarray | None, seed: Sequence[int] | None
    ) -> None:
        self._ranks, self._pools, self._costs, self._seed = list(ranks), pools, costs, seed
        self._ends = np.cumsum(pools.steps)
        self._ready: dict[int, tuple[int, list[np.ndarray]]] = {}  # by rank: a pool and its batches

    def __len__(self) -> int:
        return int(self._ends[-1])

    def part(self, step: int, rank: int, world: int) -> np.ndarray:
        """A rank's rows in a step; all ranks' if `world` is 1."""
        if world != len(self._ranks):
            return np.concatenate([self.part(step, each, len(self._ranks)) for each in range(len(self._ranks))])
        pool = int(np.searchsorted(self._ends, step, side="right"))
        return self._batches(pool, rank)[step - int(self._ends[pool] - self._pools.steps[pool])]

    def batches(self, rank: int, world: int, step: int = 0) -> Iterator[list[int]]:
        """A rank's rows in `step` and all after it."""
        for each in range(step, len(self)):
            yield self.part(each, rank, world).tolist()

    def rest(self, step: int) -> np.ndarray:
        """The rows of `step` and all after it."""
        if step >= len(self):
            return np.empty(0, np.int64)
        pool = int(np.searchsorted(self._ends, step, side="right"))
        found = []
        for rank, rows in enumerate(self._ranks):
            found += self._batches(pool, rank)[step - int(self._ends[pool] - self._pools.steps[pool]) :]
            found.append(rows.take(int(self._pools.bounds[rank, pool + 1]), len(rows)))
        return np.concatenate(found)

    def _batches(self, pool: int, rank: int) -> list[np.ndarray]:
        known, batches = self._ready.get(rank, (-1, []))
        if known != pool:
            batches = self._made(pool, rank)
            self._ready[rank] = pool, batches
        return batches

    def _made(self, pool: int, rank: int) -> list[np.ndarray]:
        """A pool's batches in the order of training, which is that of all ranks: in a step they are about as long."""
        rows = self._ranks[rank].take(*self._pools.bounds[rank, pool : pool + 2].tolist())
        count = int(self._pools.steps[pool])
        if self._costs is not None:
            rows = _falling(rows, self._costs)
        if self._pools.batch_bounds is not None:
            last = int(self._ends[pool])
            sizes = np.diff(self._pools.batch_bounds[rank, last - count : last + 1])
        else:
            sizes = self._split(rows, count)
        batches = np.split(rows, np.cumsum(sizes)[:-1])
        if self._seed is None or self._costs is None:
            return batches
        return [batches[at] for at in shuffled_indices(count, (*self._seed, pool, count)).tolist()]

    def _split(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Sizes of the batches that the budget allows, those halved that pad most until there are `count`."""
        sizes = _cut(self._costs, rows, self._pools.budget)
        lengths = np.ones(len(rows), np.int64) if self._costs is None else self._costs[rows].astype(np.int64)
        starts, half = np.cumsum(sizes) - sizes, sizes // 2
        return split_steps(sizes, count, 1, (lengths[starts] - lengths[starts + half]) * half)


def fixed_pools(counts: np.ndarray, batch_size: int, window: int, steps: int, even: bool) -> Pools:
    """Pools of `window` batches of `batch_size`, the last one of what is left; or all batches about equally large.

    Args:
        counts: rows of each rank.
        batch_size: samples per rank and step.
        window: batches to a pool.
        steps: of the epoch.
        even: whether to divide the rows evenly instead.

    Example:
        >>> fixed_pools(np.array([7, 6]), 2, 2, 3, even=False).batch_bounds.tolist()
        [[0, 2, 4, 7], [0, 2, 4, 6]]
    """
    at = np.arange(steps + 1)
    bounds = counts[:, None] * at // steps if even else np.minimum(at * batch_size, counts[:, None])
    bounds[:, -1] = counts
    firsts = np.append(np.arange(0, steps, window), steps)
    return Pools(bounds[:, firsts], np.diff(firsts), batch_bounds=bounds)


def pools_within(ranks: Sequence[RankRows], costs: np.ndarray, budget: int, size: int) -> tuple[Pools, np.ndarray]:
    """Pools of about `size` rows a rank, in as few steps as keep all batches within the budget on every rank.

    Returns:
        The pools, and how many steps each can have at most. Where a rank has fewer rows than another needs batches,
        that is less than the steps.
    """
    counts = np.array([len(rows) for rows in ranks])
    number = max(1, round(int(counts.min()) / size))
    bounds = counts[:, None] * np.arange(number + 1) // number
    steps = np.zeros(number, np.int64)
    for rank, rows in enumerate(ranks):
        for pool in range(number):
            found = rows.take(*bounds[rank, pool : pool + 2].tolist())
            steps[pool] = max(steps[pool], len(_cut(costs, _falling(found, costs), budget)))
    return Pools(bounds, steps, budget=budget), np.diff(bounds).min(axis=0)


def spread(steps: np.ndarray, most: np.ndarray, wanted: int) -> np.ndarray:
    """Give pools more steps, as evenly as it goes, until they are `wanted` in all; none gets more than `most`.

    Example:
        >>> spread(np.array([2, 3]), np.array([2, 9]), 8).tolist()
        [2, 6]
    """
    steps = steps.copy()
    while (missing := wanted - int(steps.sum())) > 0:
        room = np.flatnonzero(steps < most)
        share = np.minimum(most[room] - steps[room], max(1, missing // len(room)))
        share[np.cumsum(share) > missing] = 0
        steps[room] += share
    return steps


def _falling(rows: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The longest rows first; equally long ones stay in their order."""
    return rows[np.argsort(-costs[rows].astype(np.int64), kind="stable")]


def _cut(costs: np.ndarray | None, falling: np.ndarray, budget: int) -> np.ndarray:
    lengths = costs[falling] if costs is not None else np.ones(len(falling), np.int64)
    return cut_steps(lengths, max(1, len(falling)), 1, per_rank=None, budget=budget)
