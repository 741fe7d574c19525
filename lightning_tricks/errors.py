"""The errors that the suite raises: one small tree, so that one `except TricksError` catches them all. One warning."""

__all__ = [
    "CheckpointError",
    "DataError",
    "DegradedWarning",
    "DivergenceError",
    "MisconfigurationError",
    "MissingDependencyError",
    "NonFiniteError",
    "TricksError",
    "UnsupportedError",
]


class TricksError(Exception):
    """Base of every error that lightning-tricks raises on purpose."""


class MisconfigurationError(TricksError, ValueError):
    """An option, or a combination of options, that cannot be meant: the message names the value and the remedy."""


class DataError(MisconfigurationError):
    """The user's data cannot be used as it is: the message names the file, the rows or the column."""


class CheckpointError(TricksError):
    """A checkpoint that is truncated, belongs to another model, or lacks what was asked of it."""


class MissingDependencyError(TricksError, ImportError):
    """An optional dependency is absent: the message holds the exact `pip install` line."""


class NonFiniteError(TricksError, ArithmeticError):
    """Training met one step after another whose loss or gradient is not finite: the message names the batches."""


class DivergenceError(TricksError, ArithmeticError):
    """Training diverged again and again, whatever it went back to: the message names the steps."""


class DegradedWarning(UserWarning):
    """Something in a fit that is not what it is on one device: the message says what, and what to do instead."""


class UnsupportedError(TricksError, RuntimeError):
    """A trick that an engine cannot do exactly, refused rather than approximated.

    Args:
        trick: the trick's class name.
        engine: the engine's name, as `engine_of(trainer).name` gives it.
        reason: why it cannot be done, as a clause without a full stop.
        instead: what to use instead, as an imperative clause without a full stop.

    Example:
        >>> print(UnsupportedError("GradientClipping", "fsdp1", "its norm is of local shards", "use `fsdp2`"))
        GradientClipping cannot run on fsdp1: its norm is of local shards. Instead, use `fsdp2`.
    """

    def __init__(self, trick: str, engine: str, reason: str, instead: str) -> None:
        super().__init__(f"{trick} cannot run on {engine}: {reason}. Instead, {instead}.")
        self.trick = trick
        self.engine = engine
        self.reason = reason
        self.instead = instead
