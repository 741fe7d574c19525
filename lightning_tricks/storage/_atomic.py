"""Files and folders that appear under their name only when they are complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic_file", "partial_name", "publish_folder"]


def partial_name(path: Path) -> Path:
    """The sibling name under which `path` is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


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

    A folder cannot be exchanged in one step everywhere, so an old one is set aside first and deleted last: between
    the two renames both the old and the new one are complete on the disk, under other names.
    """
    for file in sorted(partial.rglob("*")):
        _fsync(file)
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    _fsync(path.parent)
    _remove(old)


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
