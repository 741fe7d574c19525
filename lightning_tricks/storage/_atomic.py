"""Files and folders that appear under their name only when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_file", "finish_publishing", "partial_name", "publish_folder"]

READY = ".complete"  # a folder of such a name is complete, and waits for its own name


def partial_name(path: Path) -> Path:
    """The sibling name under which `path` is written until it is complete."""
    return _sibling(path, ".partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; rename it to `path` when the block ends well, else remove it."""
    partial = partial_name(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        _fsync(partial)
        os.replace(partial, path)
        _fsync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def publish_folder(partial: Path, path: Path) -> None:
    """Rename the complete folder `partial` to `path`, replacing a file or folder of that name.

    A folder cannot be exchanged in one step everywhere. So it first takes a name that says that it is complete; then
    the old one is set aside, and the new one takes its name. Whoever is killed between has it finished by
    `finish_publishing`, or by the next call for that name.
    """
    for file in sorted(partial.rglob("*")):
        _fsync(file)
    ready = _sibling(path, READY)
    if ready.exists():
        _exchange(ready, path)  # first what an earlier call left: no complete folder is given up for a later one
    os.replace(partial, ready)
    _fsync(path.parent)
    _exchange(ready, path)


def finish_publishing(folder: Path) -> list[Path]:
    """Give the complete folders in `folder` their names, when a process was killed before it could.

    Args:
        folder: searched for what `publish_folder` leaves, without the folders below.

    Returns:
        The names that were given.
    """
    names = [ready.name[1 : -len(READY)] for ready in sorted(folder.glob(f".*{READY}")) if ready.is_dir()]
    for name in names:
        _exchange(folder / f".{name}{READY}", folder / name)
    return [folder / name for name in names]


def _exchange(ready: Path, path: Path) -> None:
    old = _sibling(path, ".old")
    if path.exists():
        _remove(old)
        os.replace(path, old)
    os.replace(ready, path)
    _fsync(path.parent)
    _remove(old)


def _sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
