"""What becomes of the learning rate after the warm-up."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import cosine_decay, inverse_square_root, linear_decay, stable_decay

__all__ = ["Constant", "Cosine", "InverseSquareRoot", "LearningRatePolicy", "Linear", "WarmupStableDecay"]


@runtime_checkable
class LearningRatePolicy(Protocol):
    """The course of the learning rate after the warm-up. A user's own is one class with this method."""

    def factor(self, step: int, steps: int) -> float:
        """The share of the highest learning rate.

        Args:
            step: optimizer steps taken since the warm-up, from 0.
            steps: how many there will be from the warm-up to the end; 0 in a fit without end.
        """


@dataclass(frozen=True)
class Constant:
    """The highest rate, to the end.

    Example:
        >>> Constant().factor(7, 10)
        1.0
    """

    def factor(self, step: int, steps: int) -> float:  # config files match policies by this exact signature
        """1."""
        return 1.0


@dataclass(frozen=True)
class Linear:
    """A straight line to the end of training.

    Args:
        end: the share of the highest rate at the end, from 0 to 1; 0 to 0.1 is usual.

    Raises:
        MisconfigurationError: if `end` is not a number from 0 to 1.

    Example:
        >>> Linear(end=0.5).factor(5, 10)
        0.75
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        require_share("end", self.end)

    def factor(self, step: int, steps: int) -> float:
        """On the line."""
        return linear_decay(step, require_end(steps, self), self.end)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine to the end of training.

    Args:
        end: the share of the highest rate at the end, from 0 to 1; 0 to 0.1 is usual.

    Raises:
        MisconfigurationError: if `end` is not a number from 0 to 1.

    Example:
        >>> round(Cosine().factor(5, 10), 6)
        0.5

    References:
        Loshchilov, Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts (ICLR 2017), without restarts.
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        require_share("end", self.end)

    def factor(self, step: int, steps: int) -> float:
        """On the cosine."""
        return cosine_decay(step, require_end(steps, self), self.end)


@dataclass(frozen=True)
class InverseSquareRoot:
    """Falls with the square root of the steps, and needs no end: `sqrt(timescale / (timescale + step))`.

    Args:
        timescale: optimizer steps, above 0: the rate is halved after three times as many. With the length of the
            warm-up it is the schedule of the original transformer.

    Raises:
        MisconfigurationError: if `timescale` is not a whole number above 0.

    Example:
        >>> InverseSquareRoot(timescale=4000).factor(12000, 0)
        0.5

    References:
        Vaswani et al.: Attention Is All You Need (NeurIPS 2017).
    """

    timescale: int

    def __post_init__(self) -> None:
        if isinstance(self.timescale, bool) or not isinstance(self.timescale, int) or self.timescale < 1:
            raise MisconfigurationError(
                f"`timescale` must be a whole number of steps above 0, got {self.timescale!r}. Take the warm-up's."
            )

    def factor(self, step: int, steps: int) -> float:
        """On the root's curve."""
        return inverse_square_root(step, self.timescale)


@dataclass(frozen=True)
class WarmupStableDecay:
    """The highest rate, and a straight line at the end only: any checkpoint before it can be trained on.

    Args:
        decay: the share of the steps after the warm-up in which the rate falls, above 0 and up to 1; 0.1 to 0.2 is
            usual.
        end: the share of the highest rate at the end, from 0 to 1.

    Raises:
        MisconfigurationError: if an option is out of range.

    Example:
        >>> [WarmupStableDecay(decay=0.2).factor(step, 100) for step in (80, 90)]
        [1.0, 0.5]

    References:
        Hägele et al.: Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (NeurIPS 2024).
    """

    decay: float = 0.1
    end: float = 0.0

    def __post_init__(self) -> None:
        require_share("decay", self.decay)
        require_share("end", self.end)
        if self.decay == 0:
            raise MisconfigurationError("`decay` must be above 0, got 0. Without a decay, use `Constant()`.")

    def factor(self, step: int, steps: int) -> float:
        """1, then on the line."""
        whole = require_end(steps, self)
        return stable_decay(step, whole, max(1, round(self.decay * whole)), self.end)


def require_share(name: str, value: float) -> None:
    """Refuse what is not a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise MisconfigurationError(f"`{name}` must be a share from 0 to 1, got {value!r}.")


def require_end(steps: int, policy: object) -> int:
    """Refuse a fit without end, for a policy that must know it."""
    if steps < 1:
        raise MisconfigurationError(
            f"{type(policy).__name__} must know when training ends, and this fit has no end: pass `total_steps`, set"
            " `Trainer(max_steps=...)` or `max_epochs`, or use `InverseSquareRoot` or `Constant`."
        )
    return steps
