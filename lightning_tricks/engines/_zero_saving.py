"""DeepSpeed's files, written so that a rank that cannot write leaves no other one waiting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_tricks.engines._saving import attempt

__all__ = ["save_zero"]


def save_zero(engine: Any, folder: Path, state: dict[str, Any], *, without_frozen: bool, first: bool) -> None:
    """Write a DeepSpeed checkpoint. All ranks pass DeepSpeed's barriers, and one that failed raises behind them.

    Args:
        engine: the DeepSpeed engine.
        folder: where to.
        state: what Lightning stores, without weights and optimizer state.
        without_frozen: whether frozen parameters are left out.
        first: whether this is rank 0.
    """
    files = _FirstFailure(engine.checkpoint_engine)
    with _writing_through(engine, files):
        engine.save_checkpoint(
            str(folder),
            tag="checkpoint",
            client_state=state,
            save_latest=False,  # below: DeepSpeed's last barrier comes behind it
            exclude_frozen_parameters=without_frozen,
        )
    if first:
        files.keep(lambda: (folder / "latest").write_text("checkpoint"))()
    if files.failure is not None:
        raise files.failure


class _FirstFailure:
    """Stands for DeepSpeed's checkpoint engine, and keeps the first failure instead of raising it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.failure: Exception | None = None

    def keep(self, work: Callable[..., object]) -> Callable[..., None]:
        """`work`, not called any more once something has failed."""

        def kept(*args: Any, **options: Any) -> None:
            if self.failure is None:
                self.failure = attempt(lambda: work(*args, **options))

        return kept

    def save(self, *args: Any, **options: Any) -> None:
        """Write a file."""
        self.keep(self._engine.save)(*args, **options)

    def makedirs(self, *args: Any, **options: Any) -> None:
        """Make a folder."""
        self.keep(self._engine.makedirs)(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@contextmanager
def _writing_through(engine: Any, files: _FirstFailure) -> Iterator[None]:
    """Let the engine write through `files`: its own files, and the scripts that it puts beside them."""
    own, scripts = engine.checkpoint_engine, "_copy_recovery_script"
    engine.checkpoint_engine = files
    if hasattr(engine, scripts):
        vars(engine)[scripts] = files.keep(getattr(engine, scripts))
    try:
        yield
    finally:
        engine.checkpoint_engine = own
        vars(engine).pop(scripts, None)
