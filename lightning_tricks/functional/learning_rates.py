"""Learning-rate schedules as shares of the highest rate: of the step or of the progress alone, so exact to resume."""

import math

__all__ = ["cosine_decay", "inverse_square_root", "linear_decay", "linear_warmup", "stable_decay"]


def linear_warmup(step: int, steps: int, start: float) -> float:
    """From `start` at step 0 to 1 at `steps`.

    Example:
        >>> [linear_warmup(step, 4, 0.0) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    return 1.0 if step >= steps else start + (1 - start) * step / steps


def linear_decay(step: int, steps: int, end: float) -> float:
    """From 1 at step 0 to `end` at `steps`, and no further.

    Example:
        >>> [linear_decay(step, 4, 0.5) for step in (0, 2, 4, 9)]
        [1.0, 0.75, 0.5, 0.5]
    """
    return 1 - (1 - end) * min(1.0, step / steps)


def cosine_decay(step: int, steps: int, end: float) -> float:
    """Half a cosine from 1 at step 0 to `end` at `steps`, and no further.

    Example:
        >>> [round(cosine_decay(step, 4, 0.0), 4) for step in (0, 1, 2, 4, 9)]
        [1.0, 0.8536, 0.5, 0.0, 0.0]

    References:
        Loshchilov, Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts (ICLR 2017), without restarts.
    """
    return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


def inverse_square_root(step: int, timescale: int) -> float:
    """1 at step 0, a half once `step` is three times the timescale: `sqrt(timescale / (timescale + step))`.

    Example:
        >>> [inverse_square_root(step, 100) for step in (0, 300)]
        [1.0, 0.5]

    References:
        Vaswani et al.: Attention Is All You Need (NeurIPS 2017), where the timescale is the warm-up.
    """
    return math.sqrt(timescale / (timescale + step))


def stable_decay(step: int, steps: int, decay: int, end: float) -> float:
    """1 until the last `decay` of `steps`, then linearly to `end`.

    Example:
        >>> [stable_decay(step, 10, 4, 0.0) for step in (0, 6, 8, 10)]
        [1.0, 1.0, 0.5, 0.0]

    References:
        Hägele et al.: Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (NeurIPS 2024).
    """
    return linear_decay(max(0, step - (steps - decay)), decay, end)
