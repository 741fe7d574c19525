"""A shuffle that moves nothing far: what a reader of a stream can follow with a bounded buffer."""

from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["nearby_order"]

LEAST = 4096  # positions drawn at a time
FINE = 16  # bits of a key below the position
BITS = 20  # of a random number


def nearby_order(count: int, reach: int, seed: Sequence[int], start: int = 0) -> Iterator[np.ndarray]:
    """The positions 0 to `count - 1` in shuffled order, from the `start`-th on, in pieces.

    Position p is drawn a key between p and p + `reach`, and positions come by rising keys. So none comes more than
    `reach` places earlier or later than it lay, and one that comes has all but `reach` of those before it behind it.
    A pure function of the arguments, the same on every platform; it holds about three times `reach` positions.

    Args:
        count: of positions, below 2^46.
        reach: how far a position may move, below 2^30; 0 leaves the order as it is.
        seed: whole numbers of at least 0.
        start: how many to leave out at the front, at hardly a cost.

    Returns:
        Pieces of int64 positions, none of them empty.

    Example:
        >>> whole = np.concatenate(list(nearby_order(9, 3, (0, 1))))
        >>> whole.tolist(), np.concatenate(list(nearby_order(9, 3, (0, 1), 5))).tolist() == whole[5:].tolist()
        ([0, 1, 4, 2, 5, 3, 7, 6, 8], True)
    """
    size = max(reach, LEAST)
    block = start // size  # by then no more than `start` have come
    first = block * size
    at, keys = _drawn(max(0, block - 1), size, min(count, first), reach, seed)
    waiting = keys >= np.uint64(first << FINE)
    at, keys = at[waiting], keys[waiting]
    skip = start - (first - len(at))
    for number in range(block, -(-count // size)):
        more, theirs = _drawn(number, size, count, reach, seed)
        at, keys = np.concatenate([at, more]), np.concatenate([keys, theirs])
        end = (number + 1) * size
        turn = np.argsort(keys, kind="stable")  # equal keys: as they lie
        ready = len(turn) if end >= count else int(np.searchsorted(keys[turn], np.uint64(end << FINE)))
        if ready > skip:
            yield at[turn[skip:ready]]
        skip = max(0, skip - ready)
        rest = np.sort(turn[ready:])
        at, keys = at[rest], keys[rest]


def _drawn(block: int, size: int, count: int, reach: int, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The positions of a block and their keys."""
    at = np.arange(block * size, min((block + 1) * size, count), dtype=np.int64)
    words = np.random.PCG64(np.random.SeedSequence([*seed, block])).random_raw(size)[: len(at)]
    moved = ((words >> np.uint64(64 - BITS)) * np.uint64(reach)) >> np.uint64(BITS - FINE)
    return at, (at.astype(np.uint64) << np.uint64(FINE)) + moved
