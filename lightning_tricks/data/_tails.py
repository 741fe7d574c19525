"""What is left at the ends of windows, too few samples to give every rank one, as steps of its own."""

import numpy as np

from lightning_tricks.errors import DataError
from lightning_tricks.functional.batching import cut_steps

__all__ = ["gather_tails"]


def gather_tails(
    order: np.ndarray, sizes: np.ndarray, costs: np.ndarray, world: int, *, per_rank: int | None, budget: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Put the steps of fewer than `world` samples together, longest first, and cut them anew.

    If too few are left in the end, the step of most samples gives some of its shortest.

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
        DataError: if no step has samples to spare, and one more would exceed the budget.

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


def _fill_last(
    order: np.ndarray, sizes: np.ndarray, costs: np.ndarray, missing: int, budget: int | None
) -> tuple[np.ndarray, np.ndarray]:
    world = missing + int(sizes[-1])
    donor = int(np.argmax(sizes[:-1]))
    if sizes[donor] < world + missing:
        if budget is not None:
            raise DataError(
                f"{len(order)} samples cannot be shared out evenly to {world} devices in batches of"
                f" `max_tokens={budget}`, of which most hold one sample. Raise `max_tokens`."
            )
        return order, np.append(sizes[:-2], sizes[-2] + sizes[-1])
    stop = int(sizes[: donor + 1].sum())
    head = len(order) - int(sizes[-1])
    last = np.concatenate([order[head:], order[stop - missing : stop]])
    last = last[np.argsort(-costs[last].astype(np.int64), kind="stable")]
    sizes = sizes.copy()
    sizes[donor] -= missing
    sizes[-1] = world
    return np.concatenate([order[: stop - missing], order[stop:head], last]), sizes
