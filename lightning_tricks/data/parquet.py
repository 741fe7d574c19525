"""Parquet files as a source: a shard is a row group, which opens anywhere and says beforehand what it holds."""

import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_tricks.data.sources import Block, ShardedSource
from lightning_tricks.errors import DataError, DegradedWarning, MisconfigurationError, MissingDependencyError

__all__ = ["ParquetSource"]


class ParquetSource(ShardedSource):
    """Parquet files, read by row groups. A sample is a dictionary of the chosen columns.

    Lists of numbers come as numpy arrays. A reader holds whole row groups: write small ones (`row_group_size` of 1,000
    to 100,000 rows). With `corrupted="skip"` everything is read once at the start, and all ranks leave out the same.

    Args:
        files: a file, a folder, whose `*.parquet` are taken by name, or several files.
        columns: to read; None for all.
        transform: makes a sample of a row's dictionary.
        corrupted: what becomes of a file or row group that cannot be read: "error", or "skip" with a warning.

    Raises:
        MissingDependencyError: without pyarrow.
        MisconfigurationError: if `corrupted` is something else.
        DataError: if there is no file, one is damaged, or files have different columns.

    Example:
        >>> import tempfile
        >>> import pyarrow, pyarrow.parquet
        >>> path = Path(tempfile.mkdtemp(), "a.parquet")
        >>> table = pyarrow.table({"input_ids": [[5, 6], [7], [8]], "label": [0, 1, 0]})
        >>> pyarrow.parquet.write_table(table, path, row_group_size=2)
        >>> source = ParquetSource(path)
        >>> source.rows.tolist(), source[1]
        ([2, 1], {'input_ids': array([7]), 'label': 1})
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        columns: Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        corrupted: Literal["error", "skip"] = "error",
    ) -> None:
        if corrupted not in ("error", "skip"):
            raise MisconfigurationError(f"`corrupted` must be 'error' or 'skip', got {corrupted!r}.")
        self._arrow = _pyarrow()
        self.columns = None if columns is None else list(columns)
        self._open_file: tuple[Path, Any] | None = None
        self._groups: list[tuple[Path, int]] = []
        self._sizes: list[tuple[str, int]] = []
        rows: list[int] = []
        names: list[str] | None = None
        for path in _files(files):
            try:
                found, here = self._row_groups(path, names)
                names = names or here
                intact = [group for group in found if corrupted == "error" or self._is_intact(path, group[0])]
            except DataError as error:
                if corrupted == "error" or not isinstance(error.__cause__, OSError | ValueError):
                    raise
                _warn(f"{error}")
                continue
            self._sizes.append((path.name, path.stat().st_size))
            self._groups += [(path, group) for group, _ in intact]
            rows += [count for _, count in intact]
        super().__init__(rows, transform=transform)

    def fingerprint(self) -> str:
        """By the files' names and sizes, and the rows of their groups."""
        content = repr((self._sizes, self.rows.tolist(), self.columns))
        return f"{zlib.crc32(content.encode()):08x}"

    def read(self, shard: int, row: int) -> Block:
        """A whole row group.

        Raises:
            DataError: naming the file and the row group, if it is damaged.
        """
        path, group = self._groups[shard]
        table = self._table(path, group, self.columns)
        if table.num_rows != self.rows[shard]:
            raise DataError(f"Row group {group} of `{path}` has {table.num_rows} rows, but had {self.rows[shard]}.")
        return Block(0, _Rows(table.combine_chunks()))

    def column_lengths(self, column: str) -> np.ndarray:
        """The length of each row's list or text in a column, as int64; reads that column alone."""
        compute = self._arrow.compute
        found = []
        for path, group in self._groups:
            values = self._table(path, group, [column])[column]
            measure = compute.utf8_length if self._arrow.types.is_string(values.type) else compute.list_value_length
            lengths = measure(values)
            found.append(compute.fill_null(lengths, 0).to_numpy().astype(np.int64))
        return np.concatenate(found)

    def close(self) -> None:
        """Close the open file."""
        if self._open_file is not None:
            self._open_file[1].close()
            self._open_file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arrow": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _arrow=_pyarrow())

    def _row_groups(self, path: Path, names: list[str] | None) -> tuple[list[tuple[int, int]], list[str]]:
        file = self._file(path)
        here = list(file.schema_arrow.names)
        missing = [name for name in self.columns or names or here if name not in here]
        if missing:
            raise DataError(f"`{path}` has no column `{missing[0]}`. Its columns are {', '.join(here)}.")
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return [(group, count) for group, count in enumerate(counts) if count], here

    def _is_intact(self, path: Path, group: int) -> bool:
        try:
            self._table(path, group, self.columns)
        except DataError as error:
            _warn(f"{error}")
            return False
        return True

    def _file(self, path: Path) -> Any:
        if self._open_file is None or self._open_file[0] != path:
            self.close()
            try:
                file = self._arrow.parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
            except (OSError, ValueError) as error:
                raise DataError(_damaged(f"`{path}` is not a whole Parquet file", error)) from error
            self._open_file = path, file
        return self._open_file[1]

    def _table(self, path: Path, group: int, columns: list[str] | None) -> Any:
        file = self._file(path)
        try:
            return file.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, ValueError) as error:
            raise DataError(_damaged(f"Row group {group} of `{path}` is damaged", error)) from error


def _damaged(what: str, error: Exception) -> str:
    why = " ".join(f"{error}".split()).rstrip(".")
    return f"{what}: {why}. Write it anew, or pass `corrupted='skip'` to leave it out."


class _Rows:
    """The rows of an Arrow table, made when they are asked for."""

    def __init__(self, table: Any) -> None:
        self._columns = [
            (name, column.chunk(0)) for name, column in zip(table.column_names, table.columns, strict=True)
        ]
        self._count = int(table.num_rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        return {name: _value(column[row]) for name, column in self._columns}


def _value(scalar: Any) -> Any:
    values = getattr(scalar, "values", None)
    if values is None or getattr(values, "null_count", True) or not hasattr(values, "to_numpy"):
        return scalar.as_py()
    found = values.to_numpy(zero_copy_only=False)
    # A copy: what leaves the table is writable, as torch wants it.
    return scalar.as_py() if found.dtype == object else np.array(found)


def _files(given: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(given, str | Path):
        path = Path(given)
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    else:
        found = [Path(each) for each in given]
    if not found:
        raise DataError(f"There is no `*.parquet` in `{given}`.")
    for path in found:
        if not path.is_file():
            raise DataError(f"There is no file `{path}`. Check the path.")
    return found


def _warn(message: str) -> None:
    warnings.warn(f"Left out of the data: {message}", DegradedWarning, stacklevel=2)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Reading Parquet needs pyarrow. Run: pip install 'lightning-tricks[streaming]'"
        ) from error
    return pyarrow
