"""Patience: how long a fit may go on without an improvement, in validations, epochs, steps or seconds."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_tricks.errors import MisconfigurationError

__all__ = ["Clock", "Epochs", "Patience", "Seconds", "Steps", "Validations", "patience_of"]


class Clock(NamedTuple):
    """How far a fit has come."""

    validations: int = 0
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0

    def since(self, other: "Clock") -> "Clock":
        """The difference."""
        validations, epochs, steps = (now - then for now, then in zip(self[:3], other[:3], strict=True))
        return Clock(validations, epochs, steps, self.seconds - other.seconds)


@dataclass(frozen=True)
class Validations:
    """Patience counted in validations; what a whole number means.

    Args:
        n: how many, 1 or more.
    """

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise MisconfigurationError(
                f"EarlyStopping's `patience` must be a whole number of validations, 1 or more, got {self.n!r}. To stop "
                "at the first validation without an improvement, pass patience=1."
            )

    def spent(self, elapsed: Clock) -> str | None:
        """How long it was, in words, if that is too long."""
        return f"{elapsed.validations} validations" if elapsed.validations >= self.n else None


@dataclass(frozen=True)
class Epochs:
    """Patience counted in epochs, however often each is validated.

    Args:
        n: how many, 1 or more.

    Example:
        >>> from lightning_tricks.callbacks import Epochs
        >>> Epochs(3)
        Epochs(n=3)
    """

    n: int

    def __post_init__(self) -> None:
        _refuse_uncountable("Epochs", self.n)

    def spent(self, elapsed: Clock) -> str | None:
        """How long it was, in words, if that is too long."""
        return f"{elapsed.epochs} epochs" if elapsed.epochs >= self.n else None


@dataclass(frozen=True)
class Steps:
    """Patience counted in optimizer steps. It is looked at after validations.

    Args:
        n: how many, 1 or more.

    Example:
        >>> from lightning_tricks.callbacks import Steps
        >>> Steps(2000)
        Steps(n=2000)
    """

    n: int

    def __post_init__(self) -> None:
        _refuse_uncountable("Steps", self.n)

    def spent(self, elapsed: Clock) -> str | None:
        """How long it was, in words, if that is too long."""
        return f"{elapsed.steps} steps" if elapsed.steps >= self.n else None


@dataclass(frozen=True)
class Seconds:
    """Patience counted in seconds of training and validation, by rank 0's clock. It is looked at after validations.

    Args:
        n: how many, above 0. Time between an interruption and its resumption does not count.

    Example:
        >>> from lightning_tricks.callbacks import Seconds
        >>> Seconds(3600)
        Seconds(n=3600)
    """

    n: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.n) and self.n > 0):
            raise MisconfigurationError(f"`Seconds` needs a finite number above 0, got {self.n!r}.")

    def spent(self, elapsed: Clock) -> str | None:
        """How long it was, in words, if that is too long."""
        return f"{elapsed.seconds:.0f} seconds" if elapsed.seconds >= self.n else None


Patience = Validations | Epochs | Steps | Seconds


def patience_of(given: Any) -> Patience:
    """A whole number is one of validations.

    Raises:
        MisconfigurationError: if it is neither that nor a patience.
    """
    return given if isinstance(given, Validations | Epochs | Steps | Seconds) else Validations(given)


def _refuse_uncountable(name: str, n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise MisconfigurationError(f"`{name}` needs a whole number, 1 or more, got {n!r}.")
