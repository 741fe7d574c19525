"""A stream's rows shared out to ranks by cost, so that within a budget all can have the same number of batches."""

import math
from itertools import pairwise

import numpy as np

from lightning_tricks.functional.batching import cut_steps

__all__ = ["always_enough", "batches_of", "cut_ranks"]


def batches_of(costs: np.ndarray, budget: int) -> int:
    """How many batches rows of these padded lengths need at least within a budget.

    Example:
        >>> batches_of(np.array([2, 6, 3, 3]), 6)
        3
    """
    falling = np.sort(costs)[::-1]
    return len(cut_steps(falling, max(1, len(falling)), 1, per_rank=None, budget=budget))


def always_enough(costs: np.ndarray, budget: int, world: int) -> int | None:
    """A number of steps in which `cut_ranks` shares out these rows in whatever order they come; None if none is known.

    One rank always has the same rows. Else: a row of which `c` fit into a batch takes a c-th of it. Rows need less than
    one batch more than the sum of those shares and what is lost where neighbours in length differ in `c`; and some cut
    gives every rank less than a batch more than its part of the sum. Or all hold equally many rows, and as many to a
    batch as of the longest. No more steps can be had than each rank has rows. So many will do if the rows can be dealt
    out without rest, or if so few fill a batch alone that every rank has two that do not.

    Args:
        costs: padded lengths of all rows.
        budget: padded tokens per rank and step.
        world: ranks.

    Example:
        >>> always_enough(np.array([5, 5, 2, 2, 2, 2]), 10, 2), always_enough(np.array([9] * 5), 10, 2)
        (2, None)
    """
    if world == 1:
        return batches_of(costs, budget)
    lengths, counts = np.unique(costs, return_counts=True)
    fit = np.maximum(1, budget // lengths.astype(np.int64))
    lost = math.fsum(1 - small / large for large, small in pairwise(fit.tolist()))
    shares = math.fsum(count / each for count, each in zip(counts.tolist(), fit.tolist(), strict=True))
    enough = math.ceil(shares / world + lost + 2 + 1e-6) - 1
    most, rest = divmod(len(costs), world)
    enough = min(enough, -(-(most + (rest > 0)) // int(fit[-1])))
    alone = int(counts[fit == 1].sum())
    if enough <= most:
        return enough
    return most if rest == 0 or alone < most else None


def cut_ranks(costs: np.ndarray, world: int, budget: int, steps: int | None) -> np.ndarray | None:
    """Where each rank's contiguous part starts, and the last one stops: parts of equal cost, as far as `steps` allow.

    Each part has `steps` rows at least, and needs no more batches than that. A part that grows by a row needs one batch
    more at most: so of all places where it can end none is passed over, and each cut may be moved on its own.

    Args:
        costs: padded lengths of the rows in their order.
        world: ranks.
        budget: padded tokens per rank and step.
        steps: that every rank is to have; None: any number.

    Returns:
        `world + 1` bounds; None if there are no such parts.

    Example:
        >>> cut_ranks(np.array([1, 1, 1, 1, 4, 4]), 2, 4, None).tolist()
        [0, 5, 6]
        >>> cut_ranks(np.array([1, 1, 1, 1, 4, 4]), 2, 4, 2).tolist()
        [0, 4, 6]
    """
    sums = np.cumsum(costs, dtype=np.int64)
    targets = np.array([int(sums[-1]) * rank // world for rank in range(1, world)], np.int64)
    ideal = np.array([0, *(np.searchsorted(sums, targets) + 1), len(costs)])
    ranks = np.arange(world + 1)
    ideal = np.maximum.accumulate(ideal - ranks) + ranks  # a row for each, however long one is
    ideal = np.minimum(ideal, len(costs) - world + ranks)
    if steps is None or all(_fits(costs, first, stop, budget, steps) for first, stop in pairwise(ideal.tolist())):
        return np.asarray(ideal)
    return _moved(costs, ideal.tolist(), budget, steps)


def _fits(costs: np.ndarray, first: int, stop: int, budget: int, steps: int) -> bool:
    return stop - first >= steps and batches_of(costs[first:stop], budget) <= steps


def _moved(costs: np.ndarray, ideal: list[int], budget: int, steps: int) -> np.ndarray | None:
    """The cuts nearest to the ideal ones from which the ranks before and after can have their `steps`."""
    world, count = len(ideal) - 1, len(costs)
    earliest = [count]
    for _ in range(world):
        earliest.append(_first_of(costs, earliest[-1], budget, steps))
    if earliest[-1] > 0 or count < world * steps:
        return None
    cuts = [0]
    for rank, low in zip(range(1, world), reversed(earliest[1:-1]), strict=True):
        cut = max(ideal[rank], cuts[-1] + steps, low)
        cut = min(cut, count - (world - rank) * steps)
        cuts.append(min(cut, _last_of(costs, cuts[-1], cut, budget, steps)))
    return np.array([*cuts, count])


def _first_of(costs: np.ndarray, stop: int, budget: int, steps: int) -> int:
    """The first row of the longest part up to `stop` that needs no more batches than `steps`."""
    low, high = 0, max(0, stop - steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if batches_of(costs[middle:stop], budget) <= steps else (middle + 1, high)
    return low


def _last_of(costs: np.ndarray, first: int, stop: int, budget: int, steps: int) -> int:
    """The end of the longest part from `first`, up to `stop`, that needs no more batches than `steps`."""
    low, high = min(first + steps, stop), stop
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if batches_of(costs[first:middle], budget) <= steps else (low, middle - 1)
    return low
