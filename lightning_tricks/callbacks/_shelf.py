"""A folder of weights files that outlive their eviction for as long as a checkpoint may need them."""

import secrets
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from lightning_tricks.engines import Engine

__all__ = ["Shelf"]


class Shelf:
    """Names, keeps and deletes the weights files of one callback in one run.

    A run that is killed resumes from its last checkpoint, which lists the files of that moment. So a file that the
    last checkpoint lists is not deleted when it is evicted, but once a checkpoint that no longer lists it has been
    written. Lightning asks a callback for its state just before it writes a checkpoint and returns to the callback
    only after; `settle()`, called first in a later hook, draws that conclusion. With one checkpoint a validation,
    a shelf of K files holds at most 2K + 1.

    Every name carries the run's token, so that two runs in one folder never touch each other's files.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._token = ""
        self._listed: set[str] = set()  # by the last checkpoint that is certainly on disk
        self._asked: set[str] | None = None  # by a checkpoint that may still be being written
        self._evicted: set[str] = set()

    def open(self, folder: Path) -> None:
        """Use this folder from now on."""
        self._folder = folder

    def path(self, name: str) -> Path:
        """Where the file of this name lies."""
        return self._folder / name

    def new_name(self, kind: str, step: int) -> str:
        """A name for weights of this kind and optimizer step."""
        return f"{kind}-step={step}-{self._token}.safetensors"

    def settle(self, engine: Engine) -> None:
        """Note that a checkpoint that was being written is now on disk; delete what nothing needs any more."""
        if self._asked is not None:
            self._listed, self._asked = self._asked, None
        self._sweep(engine)

    def evict(self, names: Collection[str], engine: Engine) -> None:
        """Give up these files: at once, or when no checkpoint lists them any more."""
        self._evicted |= set(names)
        self._sweep(engine)

    def capture(self, names: Collection[str]) -> dict[str, Any]:
        """State for a checkpoint that is about to be written, listing these files."""
        self._asked = set(names)
        return {"run": self._token, "files": list(names)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the run and the files that a checkpoint lists."""
        self._token = state["run"]
        self._listed, self._asked, self._evicted = set(state["files"]), None, set()

    def start(self, names: Collection[str], engine: Engine) -> set[str]:
        """Begin or go on with a run: delete what it wrote after the checkpoint resumed from. Collective.

        Args:
            names: the files in use, as far as the run knows.
            engine: the engine that trains.

        Returns:
            Those of them that are gone.
        """
        resumed = bool(self._token)
        self._token = engine.broadcast(self._token or secrets.token_hex(4))
        if resumed and engine.rank == 0:
            known = self._listed | self._evicted | set(names)
            self._delete(path for path in self._folder.glob(f"*{self._token}*") if path.name not in known)
        return engine.broadcast({name for name in names if not self.path(name).is_file()})

    def _sweep(self, engine: Engine) -> None:
        free = self._evicted - self._listed - (self._asked or set())
        self._evicted -= free
        if engine.rank == 0:
            self._delete(map(self.path, free))

    @staticmethod
    def _delete(paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
