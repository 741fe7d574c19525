"""Pack sequences into rows of a fixed capacity as best-fit-decreasing does, in time of the lengths' histogram."""

import bisect

import numpy as np

__all__ = ["pack_best_fit"]

Run = tuple[int, int]  # the first of some consecutive bins of equal space, and how many


def pack_best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit-decreasing: each sequence, the longest first, goes to the fullest bin that still takes it.

    Sequences of one length and bins of equal space are treated together, so that the time depends on how many lengths
    there are, not on how many sequences; the bins are those of the plain algorithm.

    Args:
        lengths: whole numbers from 1 to `capacity`.
        capacity: tokens to a bin.

    Returns:
        The bin of each sequence, int64, and the number of bins.

    Example:
        >>> bins, count = pack_best_fit(np.array([5, 3, 6, 2]), 8)
        >>> bins.tolist(), count
        ([1, 1, 0, 0], 2)

    References:
        Johnson et al.: Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms (SIAM J. Comput.
        1974). Krell et al.: Efficient Sequence Packing without Cross-contamination (2021), packs by histogram.
    """
    packing = _Packing(capacity)
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        packing.place(length, int(counts[length]))
    narrow = lengths.astype(np.uint16, copy=False) if capacity < 1 << 16 else lengths
    order = np.argsort(narrow, kind="stable")[::-1]
    bins = np.empty(len(lengths), np.int64)
    bins[order] = packing.bins()
    return bins, packing.count


class _Packing:
    """Open bins by the space that they have left, and what was put where."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._open: dict[int, list[Run]] = {}
        self._spaces: list[int] = []  # the keys of `_open`, sorted
        self._placed: list[tuple[int, int, int]] = []  # first bin, bins, sequences to each

    def place(self, length: int, count: int) -> None:
        """Put `count` sequences of one length into the fullest bins that take them, or into new ones."""
        while count:
            space, (first, bins) = self._fullest(length, count)
            each = space // length
            filled = min(bins, count // each)
            self._put(first, filled, each, space - each * length)
            count -= filled * each
            if count and filled < bins:
                self._put(first + filled, 1, count, space - count * length)
                count, filled = 0, filled + 1
            self._keep(space, (first + filled, bins - filled))

    def bins(self) -> np.ndarray:
        """The bin of each sequence in the order in which they were placed."""
        first, bins, each = np.array(self._placed, np.int64).T
        place = np.arange(int(bins.sum())) - np.repeat(np.cumsum(bins) - bins, bins)
        return np.repeat(np.repeat(first, bins) + place, np.repeat(each, bins))

    def _fullest(self, length: int, count: int) -> tuple[int, Run]:
        at = bisect.bisect_left(self._spaces, length)
        if at == len(self._spaces):
            new = -(-count // (self.capacity // length))
            self.count += new
            return self.capacity, (self.count - new, new)
        space = self._spaces[at]
        run = self._open[space].pop()
        if not self._open[space]:
            del self._open[space], self._spaces[at]
        return space, run

    def _put(self, first: int, bins: int, each: int, left: int) -> None:
        if bins:
            self._placed.append((first, bins, each))
            self._keep(left, (first, bins))

    def _keep(self, space: int, run: Run) -> None:
        if not space or not run[1]:
            return
        if space not in self._open:
            bisect.insort(self._spaces, space)
        self._open.setdefault(space, []).append(run)
