"""The greedy choice of a soup's members."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from lightning_tricks.functional.scores import rank_scores

__all__ = ["Selection", "greedy_selection"]


class Selection(NamedTuple):
    """What `greedy_selection` chose.

    Attributes:
        chosen: positions of the members, best first.
        score: that of the mean of the chosen.
        tried: the score of the mean with each member that was rejected, by its position; its own if that is not finite.
    """

    chosen: list[int]
    score: float
    tried: dict[int, float]


def greedy_selection(
    scores: Sequence[float], score_together: Callable[[list[int]], float], *, mode: Literal["min", "max"]
) -> Selection:
    """Take in members, best first, each that does not make the score of their mean worse.

    Args:
        scores: each member's own score. One that is not finite is rejected; equal ones keep their order.
        score_together: the score of the mean of the members at some positions; one that is not finite is worse.
        mode: `"min"` if lower is better, `"max"` if higher is.

    Raises:
        ValueError: if no score is finite.

    Example:
        >>> from lightning_tricks.functional import greedy_selection
        >>> values = [1.0, 4.0, 7.0]
        >>> def distance(chosen):
        ...     return abs(3 - sum(values[place] for place in chosen) / len(chosen))
        >>> greedy_selection([distance([place]) for place in range(3)], distance, mode="min")
        Selection(chosen=[1, 0], score=0.5, tried={2: 1.0})

    References:
        Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models (ICML 2022), recipe 1.
    """
    order = rank_scores(scores, mode=mode)
    if not order:
        raise ValueError(f"no score is finite: {list(scores)}")
    chosen, best = order[:1], scores[order[0]]
    tried = {place: score for place, score in enumerate(scores) if not math.isfinite(score)}
    for place in order[1:]:
        together = score_together([*chosen, place])
        if math.isfinite(together) and (together <= best if mode == "min" else together >= best):
            chosen, best = [*chosen, place], together
        else:
            tried[place] = together
    return Selection(chosen, best, tried)
