"""The learning rate of snapshot ensembles: cosine descents, each from the full rate."""

import math

__all__ = ["cosine_restarts", "cycle_ends"]


def cycle_ends(steps: int, cycles: int) -> list[int]:
    """The steps after which each cycle is complete: as equal as whole numbers allow, the last one at the end.

    Args:
        steps: optimizer steps in all, at least as many as cycles.
        cycles: 1 or more.

    Example:
        >>> from lightning_tricks.functional import cycle_ends
        >>> cycle_ends(10, 3)
        [3, 6, 10]
    """
    return [steps * (cycle + 1) // cycles for cycle in range(cycles)]


def cosine_restarts(step: int, steps: int, cycles: int, floor: float = 0.0) -> float:
    """The share of the full learning rate that the next step takes.

    Args:
        step: optimizer steps taken so far, 0 or more.
        steps: optimizer steps in all.
        cycles: 1 or more.
        floor: the share that each cycle descends towards, in [0, 1).

    Returns:
        1 at the start of each cycle, near `floor` at its last step; `floor` beyond the last cycle.

    Example:
        >>> from lightning_tricks.functional import cosine_restarts
        >>> [round(cosine_restarts(step, 8, 2), 2) for step in range(8)]
        [1.0, 0.85, 0.5, 0.15, 1.0, 0.85, 0.5, 0.15]

    References:
        Huang et al.: Snapshot ensembles: train 1, get M for free (ICLR 2017), equation 2.
    """
    ends = cycle_ends(steps, cycles)
    if step >= ends[-1]:
        return floor
    cycle = next(place for place, end in enumerate(ends) if step < end)
    start = ends[cycle - 1] if cycle else 0
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * (step - start) / (ends[cycle] - start)))
