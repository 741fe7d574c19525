"""The files that a configuration names: what tells whether the data are still what they were."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["fingerprint_of_files"]


def fingerprint_of_files(*sections: Any) -> str:
    """A checksum of the files and folders that some sections of a configuration name; empty if they name none.

    Of a file its content counts, read once; of a folder the names, sizes and times of change of what lies in it.

    Args:
        sections: mappings and sequences, at any depth, of values; those that are paths of what exists are taken.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "some.csv"
        >>> _ = path.write_text("text,label")
        >>> before = fingerprint_of_files({"init_args": {"path": str(path), "limit": 3}})
        >>> _ = path.write_text("text,class")
        >>> before == fingerprint_of_files({"init_args": {"path": str(path), "limit": 3}})
        False
        >>> fingerprint_of_files({"path": "reviews"})
        ''
    """
    named = [found for section in sections for found in _named(section, "")]
    if not named:
        return ""
    digest = hashlib.sha256()
    for option, path in named:
        digest.update(f"{option}\0".encode())
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(repr(_listed(path)).encode())
    return digest.hexdigest()


def _named(value: Any, option: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield from _named(value[name], f"{option}.{name}")
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _named(item, f"{option}.{place}")
    elif isinstance(value, str | os.PathLike) and (path := Path(value)) != Path() and _exists(path):
        yield option, path


def _exists(path: Path) -> bool:
    try:
        return path.is_file() or path.is_dir()
    except (OSError, ValueError):  # a text that no path can be
        return False


def _listed(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
