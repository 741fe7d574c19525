"""Evaluations that a trick runs for itself within a fit: nobody else is to count them."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer

__all__ = ["aside", "is_aside"]

_TRAINERS: weakref.WeakSet[Trainer] = weakref.WeakSet()


@contextmanager
def aside(trainer: Trainer) -> Iterator[None]:
    """Mark what the Trainer runs within the block as a trick's own."""
    _TRAINERS.add(trainer)
    try:
        yield
    finally:
        _TRAINERS.discard(trainer)


def is_aside(trainer: Trainer) -> bool:
    """Whether the present evaluation is a trick's own, of weights that training does not hold.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.engines._aside import aside, is_aside
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> with aside(trainer):
        ...     is_aside(trainer)
        True
        >>> is_aside(trainer)
        False
    """
    return trainer in _TRAINERS
