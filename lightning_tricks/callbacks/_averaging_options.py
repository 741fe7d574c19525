"""The options of WeightAveraging, checked."""

from typing import Any, Literal, get_args

from lightning_tricks.callbacks._averaging_policies import AveragingPolicy, Interval
from lightning_tricks.errors import MisconfigurationError

__all__ = ["PURPOSES", "Purpose", "checked_count", "checked_interval", "checked_policy", "checked_purposes"]

Purpose = Literal["checkpoints", "result", "test", "validation"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def checked_policy(policy: Any) -> AveragingPolicy:
    """The policy, if it is one.

    Raises:
        MisconfigurationError: otherwise.
    """
    if not isinstance(policy, AveragingPolicy):
        raise MisconfigurationError(
            f"WeightAveraging's `policy` must be an EMA, an SWA or a LAWA, got {policy!r}: pass EMA(decay=0.999)."
        )
    return policy


def checked_interval(interval: Any) -> Interval:
    """The interval between updates, if it is one.

    Raises:
        MisconfigurationError: otherwise.
    """
    whole = isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1
    if not whole and interval != "epoch":
        raise MisconfigurationError(
            f"WeightAveraging's `update_every` must be a whole number of optimizer steps, 1 or more, or 'epoch', got"
            f" {interval!r}."
        )
    found: Interval = interval
    return found


def checked_purposes(purposes: Any) -> tuple[Purpose, ...]:
    """The purposes, sorted and each once.

    Raises:
        MisconfigurationError: otherwise.
    """
    unknown = [purposes] if isinstance(purposes, str) else [each for each in purposes if each not in PURPOSES]
    if unknown:
        raise MisconfigurationError(
            f"WeightAveraging's `use_for` must be a list out of {', '.join(PURPOSES)}, got {unknown[0]!r}."
        )
    return tuple(sorted(set(purposes)))


def checked_count(batches: Any, trick: str = "WeightAveraging") -> int:
    """The number of batches, if it is one.

    Raises:
        MisconfigurationError: otherwise.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
        raise MisconfigurationError(
            f"{trick}'s `statistics_batches` must be a whole number, 0 or more, got {batches!r}."
        )
    return batches
