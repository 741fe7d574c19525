"""Cut sequences of different lengths into steps of little padding, in numpy: lengths in, indices and sizes out."""

from collections.abc import Callable, Sequence

import numpy as np

__all__ = [
    "cut_steps",
    "deal_to_windows",
    "share_out",
    "shuffle_to_windows",
    "shuffled",
    "shuffled_indices",
    "split_steps",
]

Values = Callable[[int, int], np.ndarray]  # those of a range of places, as uint64

RANDOM = 30  # bits, at least, that a shuffle goes by; among ten million values one neighbour in 200 shares all of them
PART = 1 << 16  # samples treated at a time: what stays in a core's cache, and bounds the memory
LOCKSTEP = 64  # windows from which on they are cut side by side


def shuffled_indices(count: int, seed: Sequence[int]) -> np.ndarray:
    """A permutation that depends on `seed` alone, the same on every platform and with every version of numpy.

    Args:
        count: of indices, below 2^32.
        seed: whole numbers of at least 0.

    Returns:
        uint32 indices.

    Example:
        >>> shuffled_indices(5, (0, 1)).tolist()
        [4, 1, 2, 0, 3]
    """
    return _shuffled(count, max(1, count - 1), seed, lambda start, stop: np.arange(start, stop, dtype=np.uint64))


def shuffled(values: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """The values in an order that depends on `seed` alone: `values[shuffled_indices(len(values), seed)]`, but quicker.

    Args:
        values: whole numbers from 0 to 2^32.
        seed: whole numbers of at least 0.

    Returns:
        uint32 values.

    Example:
        >>> shuffled(np.array([10, 11, 12, 13, 14]), (0, 1)).tolist()
        [14, 11, 12, 10, 13]
    """
    largest = max(1, len(values) - 1, int(values.max(initial=0)))
    return _shuffled(len(values), largest, seed, lambda start, stop: values[start:stop].astype(np.uint64))


def _shuffled(count: int, largest: int, seed: Sequence[int], values: Values) -> np.ndarray:
    bits = largest.bit_length()
    words = _sorted_words(count, bits, seed, values)
    found: np.ndarray = words.astype(np.uint32)
    found &= np.uint32((1 << bits) - 1)
    return found


def _sorted_words(count: int, bits: int, seed: Sequence[int], values: Values) -> np.ndarray:
    # PCG64's raw words are the same everywhere; numpy's own `permutation` may change. Words are sorted with the value
    # in their low bits, four times faster than a shuffle, and with no look-up all over the memory.
    words = np.random.PCG64(np.random.SeedSequence(list(seed))).random_raw(count)
    for start in range(0, count, PART):
        part = words[start : start + PART]
        part &= np.uint64((1 << 64) - (1 << bits))
        part |= values(start, start + len(part))
    words.sort()
    return words


def deal_to_windows(order: np.ndarray, lengths: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort `order` within each `window` of it, the longest first; ties stay as they come.

    Args:
        order: indices into `lengths`.
        lengths: whole numbers from 0 to 2^31.
        window: indices to a window, at least 1.

    Returns:
        The indices, and the lengths in their order, in as few bytes as they need.

    Example:
        >>> order, lengths = deal_to_windows(np.array([0, 1, 2, 3]), np.array([1, 5, 2, 9]), 2)
        >>> order.tolist(), lengths.tolist()
        ([1, 0, 3, 2], [5, 1, 9, 2])
    """
    longest, lengths = _narrow(lengths)

    def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return order[start:stop], lengths.take(order[start:stop])

    return _dealt(np.empty_like(order), np.empty(len(order), lengths.dtype), window, longest, part)


def shuffle_to_windows(
    values: np.ndarray | range, lengths: np.ndarray, seed: Sequence[int], window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle values by `seed` alone, and sort them within each `window`, the longest first; ties are shuffled.

    Args:
        values: whole numbers from 0 to 2^32; a range of all places takes no memory.
        lengths: of each of `values`, from 0 to 2^31.
        seed: whole numbers of at least 0.
        window: values to a window, at least 1.

    Returns:
        uint32 values, and their lengths, in as few bytes as they need.

    Example:
        >>> found, lengths = shuffle_to_windows(np.array([10, 11, 12, 13, 14]), np.array([1, 2, 3, 4, 5]), (0, 1), 3)
        >>> found.tolist(), lengths.tolist()
        ([14, 12, 11, 13, 10], [5, 3, 2, 4, 1])
    """
    longest, lengths = _narrow(lengths)
    low = max(1, values[-1] if isinstance(values, range) else int(values.max(initial=0))).bit_length()
    high = max(1, longest).bit_length()
    if low + high > 64 - RANDOM:  # too few bits are left to shuffle by
        turn = shuffled_indices(len(values), seed)
        order, falling = deal_to_windows(turn, lengths, window)
        return _taken(values, order), falling

    def carried(start: int, stop: int) -> np.ndarray:
        found = lengths[start:stop].astype(np.uint64) << np.uint64(low)
        found |= _taken(values, slice(start, stop)).astype(np.uint64)
        return found

    words = _sorted_words(len(values), low + high, seed, carried)

    def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        found = words[start:stop]
        order = found.astype(np.uint32) & np.uint32((1 << low) - 1)
        return order, ((found >> np.uint64(low)) & np.uint64((1 << high) - 1)).astype(lengths.dtype)

    return _dealt(np.empty(len(values), np.uint32), np.empty(len(values), lengths.dtype), window, longest, part)


def _taken(values: np.ndarray | range, places: np.ndarray | slice) -> np.ndarray:
    if not isinstance(values, range):
        return values[places].astype(np.uint32, copy=False)
    if isinstance(places, slice):
        places = np.arange(places.start, places.stop, dtype=np.uint32)
    return places * np.uint32(values.step) + np.uint32(values.start)


def _narrow(lengths: np.ndarray) -> tuple[int, np.ndarray]:
    """The longest, and all in two bytes each if that will do: half of what is fetched from all over the memory."""
    longest = int(lengths.max(initial=0))
    return longest, lengths.astype(np.uint16, copy=False) if longest < 1 << 16 else lengths


def _dealt(
    order: np.ndarray,
    falling: np.ndarray,
    window: int,
    longest: int,
    part: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Fill `order` and `falling` with what `part` gives for a range, sorted within windows."""
    count = len(order)
    window = max(1, min(window, count))
    step = max(1, PART // window) * window
    whole = count // window * window
    for start, stop in [*((at, min(at + step, whole)) for at in range(0, whole, step)), (whole, count)]:
        values, lengths = part(start, stop)
        places = _sort_rows(lengths.reshape(-1, min(window, max(1, stop - start))), longest, falling[start:stop])
        values.take(places, out=order[start:stop], mode="clip")
    return order, falling


def _sort_rows(rows: np.ndarray, longest: int, falling: np.ndarray) -> np.ndarray:
    """Write the rows, each sorted, to `falling`; give the places that the values were at, of all rows together."""
    # One integer holds both the length, turned round, and the place: a plain sort is several times an argsort.
    count, width = rows.shape
    bits = max(1, int(width - 1).bit_length())
    kind = np.uint32 if bits + longest.bit_length() <= 32 else np.uint64
    keys = np.subtract(kind(longest), rows, dtype=kind, casting="unsafe")
    keys <<= kind(bits)
    keys |= np.arange(width, dtype=kind)
    keys.sort(axis=1)
    np.subtract(longest, (keys >> kind(bits)).ravel(), out=falling, casting="unsafe")
    keys &= kind((1 << bits) - 1)
    keys += np.arange(0, count * width, width, dtype=kind)[:, None]
    return np.asarray(keys.ravel())


def cut_steps(lengths: np.ndarray, window: int, world: int, *, per_rank: int | None, budget: int | None) -> np.ndarray:
    """Sizes of steps, cut greedily from the front of each window of falling lengths.

    A step takes a batch for each of `world` ranks: `per_rank` samples, or as many as keep the batch's longest times
    their number within `budget`, at least one. The last step of a window takes what is left.

    Args:
        lengths: falling within each window.
        window: samples to a window.
        world: ranks.
        per_rank: samples per rank, or None to go by the budget.
        budget: padded tokens per rank, or None to go by `per_rank`.

    Returns:
        int64 sizes in samples over all ranks; they add up to the number of lengths.

    Example:
        >>> cut_steps(np.array([8, 4, 4, 2, 2, 1]), 6, 1, per_rank=None, budget=8).tolist()
        [1, 2, 3]
    """
    first = np.arange(0, len(lengths), window)
    end = np.minimum(first + window, len(lengths))
    if per_rank is None and len(first) < LOCKSTEP:
        starts = _cut_one_by_one(lengths, first, end, world, budget or 0)
    else:
        starts = _cut_in_lockstep(lengths, first, end, world, per_rank, budget)
    return np.diff(np.append(starts, len(lengths)))


def _cut_one_by_one(lengths: np.ndarray, first: np.ndarray, end: np.ndarray, world: int, budget: int) -> np.ndarray:
    starts = []
    for at, stop in zip(first.tolist(), end.tolist(), strict=True):
        while at < stop:
            starts.append(at)
            for _ in range(world):
                at += max(1, budget // int(lengths[at])) if at < stop else 0
    return np.asarray(starts, np.int64)


def _cut_in_lockstep(
    lengths: np.ndarray, first: np.ndarray, end: np.ndarray, world: int, per_rank: int | None, budget: int | None
) -> np.ndarray:
    found = []
    while len(first):
        found.append(first)
        if per_rank is not None:
            first = first + world * per_rank
        for _ in range(world if per_rank is None else 0):
            longest = lengths[np.minimum(first, end - 1)].astype(np.int64)
            first = np.minimum(first + np.maximum(1, (budget or 0) // longest), end)
        going_on = first < end
        first, end = first[going_on], end[going_on]
    starts = np.concatenate(found)
    starts.sort()
    return starts


def share_out(lengths: np.ndarray, world: int, budget: int) -> list[int]:
    """Where each rank's part of a step starts, so that the dearest part costs the least: samples times the longest.

    Args:
        lengths: of the step's samples, falling; at least `world` of them.
        world: ranks.
        budget: what no part exceeds, but for a single sample that does; the step must allow for it.

    Returns:
        `world` starts, rising from 0.

    Example:
        >>> share_out(np.array([6, 3, 3, 2, 2, 2]), 2, 12)
        [0, 2]
    """
    falling = lengths.tolist()
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_parts(falling, middle, world)) <= world else (middle + 1, high)
    starts = _parts(falling, low, world)
    while len(starts) < world:  # parts of equal cost are not always that many: halve those of most samples
        sizes = np.diff([*starts, len(falling)])
        most = int(np.argmax(sizes))
        starts.insert(most + 1, starts[most] + int(sizes[most] + 1) // 2)
    return starts


def _parts(falling: list[int], budget: int, world: int) -> list[int]:
    """The starts of parts within the budget, cut greedily; one more than `world` if they are too many."""
    starts: list[int] = []
    at = 0
    while at < len(falling) and len(starts) <= world:
        starts.append(at)
        at += max(1, budget // falling[at])
    return starts


def split_steps(sizes: np.ndarray, count: int, world: int, gains: np.ndarray) -> np.ndarray:
    """Split steps until there are `count`, none with fewer samples than ranks.

    First those that gain by it, each once, the most first; then those of most samples, as often as it takes.

    Args:
        sizes: samples of each step, each at least `world`.
        count: the steps wanted, from `len(sizes)` to the sum of `sizes // world`.
        world: ranks.
        gains: of each step, what halving it saves.

    Returns:
        The sizes; the parts of a step lie where it lay.

    Example:
        >>> split_steps(np.array([4, 9]), 3, 2, np.zeros(2)).tolist()
        [4, 5, 4]
        >>> split_steps(np.array([4, 9]), 3, 2, np.array([5, 0])).tolist()
        [2, 2, 9]
    """
    if count == len(sizes):
        return sizes
    units = sizes // world
    gains = np.where(units > 1, gains, 0)
    parts = np.ones_like(sizes)
    best = np.argsort(-gains, kind="stable")[: count - len(sizes)]
    parts[best[gains[best] > 0]] += 1
    while (missing := count - int(parts.sum())) > 0:
        share = np.where(parts < units, units / parts, 0.0)
        most = np.argsort(-share, kind="stable")[:missing]
        parts[most[share[most] > 0]] += 1
    index = np.repeat(np.arange(len(sizes)), parts)
    place = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
    shares = units[index] // parts[index] + (place < units[index] % parts[index])
    rest = np.where(place == 0, sizes[index] % world, 0)
    return np.asarray(shares * world + rest)
