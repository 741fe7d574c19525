"""What was made so far, batch by batch, in a file that survives a kill at any point."""

import json
import os
from pathlib import Path
from typing import Any

from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["Journal", "first_difference"]


class Journal:
    """Lines of JSON: first what was asked for, then the texts of each batch. A line counts once it is whole.

    Args:
        path: of the file.
        asked: what decides all that is made.

    Raises:
        MisconfigurationError: if the file is of something else.
        DataError: if it is damaged otherwise than by an interruption.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a")
        >>> Journal(path, {"seed": 0}).add(["one"])
        >>> with path.open("a") as file:
        ...     _ = file.write('["tw')  # and here it is killed
        >>> Journal(path, {"seed": 0}).batches
        [['one']]
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path = path
        self.batches: list[list[str]] = []
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        if not whole:
            self._append(asked)
            return
        before, *self.batches = self._parsed(whole)
        if (difference := first_difference(before, asked)) is not None:
            raise MisconfigurationError(
                f"`{path}` is of a run with {difference}. Ask for the same again to go on with it, or remove it."
            )

    def add(self, texts: list[str]) -> None:
        """Keep the texts of the next batch."""
        self._append(texts)
        self.batches.append(texts)

    def _parsed(self, whole: bytes) -> list[Any]:
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise DataError(f"`{self.path}` is damaged: {error}. Remove it, and run this again.") from error

    def _append(self, content: Any) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(content).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def first_difference(before: Any, now: dict[str, Any]) -> str | None:
    """The first thing in which two runs differ, as a clause; None if there is none.

    Example:
        >>> first_difference({"seed": 0}, {"seed": 1})
        '`seed` 0, not 1'
    """
    if not isinstance(before, dict):
        return "other contents"
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return f"`{name}` {_short(before.get(name))}, not {_short(now.get(name))}"
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
