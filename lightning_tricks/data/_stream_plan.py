"""An epoch of a stream as steps: each rank sorts pools of its own rows, and all cut them into equally many batches."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_tricks.data._stream_cuts import batches_of
from lightning_tricks.data._stream_rows import RankRows
from lightning_tricks.functional.batching import share_out, shuffled_indices

__all__ = ["Pools", "StreamPlan", "fixed_pools", "pools_within"]

WHOLE = 1 << 20  # of a rank's cost: time goes in parts of it


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
        """A pool's batches in the order of training: in a step, ranks' are about as long, or cost the same."""
        rows = self._ranks[rank].take(*self._pools.bounds[rank, pool : pool + 2].tolist())
        count = int(self._pools.steps[pool])
        if self._costs is not None:
            rows = _falling(rows, self._costs)
        if self._pools.batch_bounds is not None:
            last = int(self._ends[pool])
            sizes = np.diff(self._pools.batch_bounds[rank, last - count : last + 1])
        else:
            sizes = self._split(rows, count)
        stops = np.cumsum(sizes)
        batches = np.split(rows, stops[:-1])
        if self._pools.batch_bounds is None and self._costs is not None:  # the dearest of all ranks in the same step
            dear = sizes * self._costs[rows[stops - sizes]].astype(np.int64)
            batches = [batches[at] for at in np.argsort(-dear, kind="stable").tolist()]
        if self._seed is None or self._costs is None:
            return batches
        return [batches[at] for at in shuffled_indices(count, (*self._seed, pool, count)).tolist()]

    def _split(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Sizes of `count` batches within the budget, of which the dearest costs the least."""
        lengths = np.ones(len(rows), np.int64) if self._costs is None else self._costs[rows]
        return np.diff([*share_out(lengths, count, self._pools.budget), len(rows)])


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


def pools_within(ordered: Sequence[np.ndarray], budget: int, window: int, rows: int, steps: int | None) -> Pools | None:
    """Pools of about `window` steps, in each of which every rank gets as far with the cost of its part as the others.

    Args:
        ordered: of each rank, the padded lengths of its rows in their order.
        budget: padded tokens per rank and step.
        window: steps to a pool.
        rows: to a pool, at most about so many on any rank.
        steps: of the epoch, as many as each rank has rows at least; None: any number.

    Returns:
        The pools; None if they need more than `steps`. A single one does not, unless a rank does.

    Example:
        >>> pools_within([np.array([2, 2, 2, 2]), np.array([4, 4])], 4, 1, 9, 2).bounds.tolist()
        [[0, 2, 4], [0, 1, 2]]
    """
    sums = [np.cumsum(each, dtype=np.int64) for each in ordered]
    counts = np.array([len(each) for each in ordered])
    number = max(1, round(sum(int(each[-1]) for each in sums) / (len(sums) * budget * window)))
    at, time, bounds = np.zeros_like(counts), 0, [np.zeros_like(counts)]
    found: list[int] = []
    while time < WHOLE:
        time = _later(time, sums, at, number, rows)
        stops = np.array([_place(each, time) for each in sums])
        needed = max(batches_of(each[a:b], budget) for each, a, b in zip(ordered, at, stops, strict=True))
        if steps is not None:
            left = steps - sum(found)
            needed = left if time == WHOLE and needed <= left else max(needed, steps * time // WHOLE - sum(found), 1)
            if needed > left - (time < WHOLE):
                return None
            # Rows enough for this pool's steps, and for those after it. As many as steps need no more than those.
            stops = np.minimum(np.maximum(stops, at + needed), counts - (left - needed))
        at = np.maximum(at, stops)
        bounds.append(at)
        found.append(needed)
    return Pools(np.stack(bounds, axis=1), np.array(found), budget=budget)


def _later(time: int, sums: Sequence[np.ndarray], at: np.ndarray, number: int, rows: int) -> int:
    """The next pool's end, as a part of `WHOLE`: one of `number`, or less where ranks would have too many rows."""
    full = WHOLE // number
    found = time + full
    for each, start in zip(sums, at.tolist(), strict=True):
        if start + rows < len(each):
            found = min(found, int(each[start + rows]) * WHOLE // int(each[-1]))
    found = max(found, time + 1 + full // 8)
    return WHOLE if WHOLE - found < full // 2 else found


def _place(sums: np.ndarray, time: int) -> int:
    """How many rows make up a part of the cost."""
    return int(np.searchsorted(sums, int(sums[-1]) * time // WHOLE, side="right"))


def _falling(rows: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The longest rows first; equally long ones stay in their order."""
    return rows[np.argsort(-costs[rows].astype(np.int64), kind="stable")]
