"""The order in which callbacks of ours treat a step's gradients, whatever their order in the Trainer's list."""

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["arrange"]


def arrange(trainer: Trainer) -> None:
    """Let callbacks with a `place` change places, so that the lowest comes first; the others stay where they are.

    The list is replaced, not changed: whoever goes through the old one meets every callback once.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    placed = [index for index, callback in enumerate(callbacks) if _place(callback) is not None]
    arranged = list(callbacks)
    for index, source in zip(placed, sorted(placed, key=lambda index: _place(callbacks[index]) or 0), strict=True):
        arranged[index] = callbacks[source]
    trainer.callbacks = arranged  # type: ignore[attr-defined]


def _place(callback: Any) -> int | None:
    place: int | None = getattr(type(callback), "place", None)
    return place
