"""Folders that litdata wrote as a source: a shard is a chunk, whose rows litdata itself reads at any place."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_tricks.data.sources import Block, ShardedSource
from lightning_tricks.errors import DataError, MisconfigurationError, MissingDependencyError

__all__ = ["LitDataSource"]


class LitDataSource(ShardedSource):
    """A local folder that `litdata.optimize` wrote. Its rows are read, and cached, by litdata; its order is ours.

    Args:
        folder: with `index.json` and the chunks.
        transform: makes a sample of a row.

    Raises:
        MissingDependencyError: without litdata.
        MisconfigurationError: if the folder was written for an item loader whose items are no rows, such as tokens.
        DataError: if the folder has no whole index, or a chunk is missing or was cut off.
    """

    def __init__(self, folder: str | Path, *, transform: Callable[[Any], Any] | None = None) -> None:
        self.folder = Path(folder)
        self._dataset: Any = None
        _litdata()
        index = _index(self.folder)
        self._chunks = [(str(chunk["filename"]), int(chunk["chunk_size"])) for chunk in index["chunks"]]
        self._checksum = zlib.crc32(json.dumps(index["chunks"], sort_keys=True).encode())
        super().__init__([size for _, size in self._chunks], transform=transform)
        for chunk in index["chunks"]:
            self._refuse_damaged(chunk)

    def fingerprint(self) -> str:
        """By the index: the chunks' names, rows and bytes."""
        return f"{self._checksum:08x}"

    def read(self, shard: int, row: int) -> Block:
        """A chunk, whose rows are read when they are asked for."""
        if self._dataset is None:
            self._dataset = _litdata().StreamingDataset(str(self.folder), shuffle=False)
        first = sum(size for _, size in self._chunks[:shard])
        return Block(0, _Items(self._dataset, *self._chunks[shard], first))

    def close(self) -> None:
        """Drop litdata's reader."""
        self._dataset = None
        self._held.clear()

    def _refuse_damaged(self, chunk: dict[str, Any]) -> None:
        path = self.folder / str(chunk["filename"])
        found = path.stat().st_size if path.is_file() else 0
        # What was compressed has another size on disk than the index says.
        if not found or (path.suffix == ".bin" and found < int(chunk["chunk_bytes"])):
            what = f"has {found} of {chunk['chunk_bytes']} bytes" if found else "is missing or empty"
            raise DataError(f"The chunk `{path}` {what}. Copy it anew, or write the folder again without it.")


class _Items:
    """The rows of a chunk."""

    def __init__(self, dataset: Any, name: str, count: int, first: int) -> None:
        self._dataset, self._name, self._count, self._first = dataset, name, count, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int, /) -> Any:
        try:
            return self._dataset[self._first + row]
        except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
            raise DataError(f"Row {row} of the chunk `{self._name}` cannot be read: {error}. Write it anew.") from error


def _index(folder: Path) -> Any:
    try:
        index = json.loads((folder / "index.json").read_text())
        chunks, config = index["chunks"], index["config"] or {}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"`{folder}` has no whole index.json ({error}). Give a local folder that `litdata.optimize` wrote."
        ) from error
    if not chunks:
        raise DataError(f"`{folder}` has no chunks. Write it with `litdata.optimize`.")
    if (loader := config.get("item_loader")) not in (None, "PyTreeLoader"):
        raise MisconfigurationError(
            f"`{folder}` was written for litdata's {loader}, whose items are no rows of the chunks. Write it with the"
            " default item loader."
        )
    return index


def _litdata() -> Any:
    try:
        import litdata
    except ImportError as error:
        raise MissingDependencyError("Reading litdata's folders needs litdata. Run: pip install litdata") from error
    return litdata
