"""Steps that give every rank a sample: of what is left at the ends of windows, and where there must be more of them."""

import numpy as np

from lightning_tricks.errors import DataError
from lightning_tricks.functional.batching import cut_steps

__all__ = ["cut_into", "gather_tails"]


def gather_tails(
    order: np.ndarray, sizes: np.ndarray, costs: np.ndarray, world: int, *, per_rank: int | None, budget: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Put the steps of fewer than `world` samples together, longest first, and cut them anew.

    If too few are left in the end, the steps of most samples give some of their shortest.

    Args:
        order: samples, step after step.
        sizes: of the steps.
        costs: padded lengths of all samples.
        world: ranks.
        per_rank: samples per rank, or None to go by the budget.
        budget: padded tokens per rank, or None to go by `per_rank`.

    Returns:
        The order and the sizes, each at least `world`.

    Raises:
        DataError: if the steps have too few samples to spare, and one more in a step would exceed the budget.

    Example:
        >>> gather_tails(np.array([0, 1, 2, 3, 4]), np.array([4, 1]), np.ones(5, int), 2, per_rank=2, budget=None)
        (array([0, 1, 2, 4, 3]), array([3, 2]))
    """
    short = sizes < world
    if not short.any():
        return order, sizes
    loose = np.repeat(short, sizes)
    pool = order[loose]
    pool = pool[np.argsort(-costs[pool].astype(np.int64), kind="stable")]
    pooled = cut_steps(costs[pool], len(pool), world, per_rank=per_rank, budget=budget)
    order, sizes = np.concatenate([order[~loose], pool]), np.concatenate([sizes[~short], pooled])
    missing = world - int(sizes[-1])
    return (order, sizes) if missing <= 0 else _fill_last(order, sizes, costs, missing, budget)


def cut_into(
    order: np.ndarray, costs: np.ndarray, steps: int, world: int, *, per_rank: int | None, budget: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut falling samples into so many steps, each of at least `world`: the longest in steps of one for each rank.

    Any number will do from that of the fullest steps on up to `len(order) // world`. Each sample more in steps of one
    for each rank adds a step at most, so that none of the numbers between is passed over.

    Args:
        order: samples, the longest first.
        costs: padded lengths of all samples.
        steps: wanted.
        world: ranks.
        per_rank: samples per rank, or None to go by the budget.
        budget: padded tokens per rank, or None to go by `per_rank`.

    Returns:
        The order and the sizes.

    Example:
        >>> cut_into(np.arange(6), np.array([6, 6, 6, 4, 4, 4]), 3, 2, per_rank=None, budget=10)[1].tolist()
        [2, 2, 2]
    """
    falling = costs[order]

    def sizes(alone: int) -> np.ndarray:
        rest = falling[alone * world :]
        cut = cut_steps(rest, max(1, len(rest)), world, per_rank=per_rank, budget=budget)
        return np.concatenate([np.full(alone, world), cut])

    low, high = 0, len(order) // world
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(sizes(middle)) >= steps else (middle + 1, high)
    found = sizes(low)
    missing = world - int(found[-1])
    return (order, found) if missing <= 0 else _fill_last(order, found, costs, missing, budget)


def _fill_last(
    order: np.ndarray, sizes: np.ndarray, costs: np.ndarray, missing: int, budget: int | None
) -> tuple[np.ndarray, np.ndarray]:
    world = missing + int(sizes[-1])
    donors = np.argsort(-sizes[:-1], kind="stable")
    spare = np.minimum(np.cumsum(np.maximum(sizes[donors] - world, 0)), missing)
    if not len(donors) or spare[-1] < missing:
        if budget is not None:
            raise DataError(
                f"{len(order)} samples cannot be shared out evenly to {world} devices in batches of"
                f" `max_tokens={budget}`, of which most hold one sample. Raise `max_tokens`."
            )
        return order, np.append(sizes[:-2], sizes[-2] + sizes[-1])
    given = np.zeros_like(sizes)
    given[donors] = np.diff(spare, prepend=0)
    moves = _ends(sizes, given)
    last = np.concatenate([order[len(order) - int(sizes[-1]) :], order[moves]])
    last = last[np.argsort(-costs[last].astype(np.int64), kind="stable")]
    moves[len(order) - int(sizes[-1]) :] = True
    sizes = sizes - given
    sizes[-1] = world
    return np.concatenate([order[~moves], last]), sizes


def _ends(sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which samples are among the last `counts` of their step."""
    stops = np.cumsum(sizes)
    place = np.arange(int(stops[-1]))
    return np.asarray(place >= np.repeat(stops - counts, sizes))
