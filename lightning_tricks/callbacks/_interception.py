"""Around a fit's validations and saves: no hook comes before all others and after all others, the module's included."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Trainer

__all__ = ["intercept", "marked"]


class _Around(Protocol):
    def validating(self) -> AbstractContextManager[None]: ...

    def saving(self, weights_only: bool) -> AbstractContextManager[None]: ...


_KNOWN: "weakref.WeakKeyDictionary[Trainer, weakref.WeakSet[Any]]" = weakref.WeakKeyDictionary()


def intercept(trainer: Trainer, around: _Around) -> None:
    """Enter `around.validating()` for each validation of this Trainer's fits, and `around.saving()` for each save.

    Once for a pair of both; it stays, and asks `around` each time. Callbacks that a helper takes out of the Trainer for
    a while are not asked.
    """
    known = _KNOWN.setdefault(trainer, weakref.WeakSet())
    if around in known:
        return
    known.add(around)
    loop = trainer.fit_loop.epoch_loop.val_loop
    run, save = loop.run, trainer.save_checkpoint
    place: Any = weakref.ref(around)

    def validate() -> Any:
        with _entered(trainer, place(), lambda found: found.validating()):
            return run()

    def save_checkpoint(filepath: str | Path, weights_only: bool | None = None, storage_options: Any = None) -> None:
        with _entered(trainer, place(), lambda found: found.saving(bool(weights_only))):
            save(filepath, weights_only, storage_options)

    vars(loop)["run"], vars(trainer)["save_checkpoint"] = validate, save_checkpoint


@contextmanager
def _entered(
    trainer: Trainer, around: _Around | None, enter: Callable[[_Around], AbstractContextManager[None]]
) -> Iterator[None]:
    callbacks: list[Any] = vars(trainer)["callbacks"]
    if around is None or not any(around is callback for callback in callbacks):
        yield
        return
    with enter(around):
        yield


@contextmanager
def marked(trainer: Trainer, mark: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Let `mark` see the checkpoints that are written within the block; of weights alone, no callback's hook does."""
    connector: Any = trainer._checkpoint_connector
    dump = connector.dump_checkpoint

    def dumped(*arguments: Any, **options: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = dump(*arguments, **options)
        mark(checkpoint)
        return checkpoint

    vars(connector)["dump_checkpoint"] = dumped
    try:
        yield
    finally:
        vars(connector)["dump_checkpoint"] = dump
