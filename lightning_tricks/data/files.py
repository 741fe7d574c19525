"""Read columns of the user's files: CSV, TSV, Parquet and JSON lines, plain, .bz2 or .gz."""

import bz2
import codecs
import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lightning_tricks.errors import DataError, MissingDependencyError

__all__ = ["is_null", "read_columns", "refuse_nulls"]

Columns = dict[str, list[Any]]
SHOWN = 5  # how many row numbers an error lists


def read_columns(path: str | Path, names: Sequence[str]) -> Columns:
    r"""The chosen columns of a file, as they stand there; what a row lacks is None.

    Args:
        path: a file named `*.csv`, `*.tsv`, `*.parquet` or `*.jsonl`, with `.bz2` or `.gz` after it if compressed.
            CSV and TSV have a header, are UTF-8, and quote with `"`.
        names: the columns wanted.

    Raises:
        DataError: if the file is missing, empty, damaged or of an unknown format, or lacks a column.
        MissingDependencyError: for Parquet without pyarrow.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.csv")
        >>> _ = path.write_text('text,label\n"well, well",good\n')
        >>> read_columns(path, ["text", "label"])
        {'text': ['well, well'], 'label': ['good']}
    """
    path = Path(path)
    read, decompress = _format(path)
    if not path.is_file():
        raise DataError(f"There is no file `{path}`. Check the path, or use `reviews` for the corpus of the demo.")
    try:
        with path.open("rb") as raw, decompress(raw) as stream:
            content = stream.read()
        if not content.removeprefix(codecs.BOM_UTF8).strip():
            raise DataError(f"`{path}` is empty. Give a file with a header and rows.")
        return read(path, content, names)
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"`{path}` cannot be read: {error}. Is the file complete, and its name right?") from error


def is_null(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, or only white space.

    Example:
        >>> [is_null(v) for v in (None, "  ", float("nan"), 0, "no")]
        [True, True, True, False, False]
    """
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def refuse_nulls(values: Sequence[Any], column: str, path: str | Path) -> None:
    """Raise if a column has cells that hold nothing.

    Raises:
        DataError: with the rows, counted from 1 without the header.

    Example:
        >>> refuse_nulls(["a", ""], "text", "x.csv")
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.DataError: Column `text` of `x.csv` is blank in 1 of 2 rows: row 2. Remove or fill it.
    """
    rows = [row for row, value in enumerate(values, 1) if is_null(value)]
    if rows:
        listed = ", ".join(map(str, rows[:SHOWN])) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
        raise DataError(
            f"Column `{column}` of `{path}` is blank in {len(rows)} of {len(values)} rows:"
            f" row{'s' * (len(rows) > 1)} {listed}. Remove or fill {'them' if len(rows) > 1 else 'it'}."
        )


def _format(path: Path) -> tuple[Callable[..., Columns], Callable[[BinaryIO], Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    decompress = DECOMPRESS.get(suffixes[-1] if suffixes else "", _as_it_is)
    if decompress is not _as_it_is:
        suffixes.pop()
    read = FORMATS.get(suffixes[-1] if suffixes else "")
    if read is None:
        raise DataError(
            f"The format of `{path}` is unknown. Known are {', '.join(FORMATS)}, each plain or with .bz2 or .gz after"
            " it; `reviews` is the corpus of the demo."
        )
    return read, decompress


def _as_it_is(raw: BinaryIO) -> BinaryIO:
    return raw


def _select(path: Path, names: Sequence[str], present: Iterable[str]) -> None:
    present = list(present)
    for name in names:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            listed = ", ".join(f"`{column}`" for column in present)
            raise DataError(f"`{path}` has no column `{name}`. Its columns are {listed}.{hint}")


def _refuse_no_rows(path: Path, rows: Sequence[Any]) -> None:
    if not rows:
        raise DataError(f"`{path}` has no rows. Give a file with at least a few examples.")


def _read_delimited(path: Path, content: bytes, names: Sequence[str], delimiter: str) -> Columns:
    text = io.StringIO(content.decode("utf-8-sig"), newline="")
    try:
        # Strict: an unbalanced quote is an error instead of swallowing the rows after it.
        header, *rows = [row for row in csv.reader(text, delimiter=delimiter, strict=True) if row] or [[]]
    except csv.Error as error:
        raise DataError(f"`{path}` is not well-formed: {error}. Quote fields and double the quotes in them.") from error
    _select(path, names, header)
    _refuse_no_rows(path, rows)
    for number, row in enumerate(rows, 1):
        if len(row) > len(header):
            raise DataError(
                f"Row {number} of `{path}` has {len(row)} fields, the header {len(header)}."
                f" Quote fields that hold {delimiter!r}."
            )
    places = {name: header.index(name) for name in names}
    return {name: [row[i] if i < len(row) else None for row in rows] for name, i in places.items()}


def _read_csv(path: Path, content: bytes, names: Sequence[str]) -> Columns:
    return _read_delimited(path, content, names, ",")


def _read_tsv(path: Path, content: bytes, names: Sequence[str]) -> Columns:
    return _read_delimited(path, content, names, "\t")


def _read_jsonl(path: Path, content: bytes, names: Sequence[str]) -> Columns:
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            rows.append(_json_object(path, number, line))
    _select(path, names, dict.fromkeys(key for row in rows for key in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"Line {number} of `{path}` is not JSON: {error}. Write one object a line.") from error
    if not isinstance(row, dict):
        raise DataError(f"Line {number} of `{path}` is not a JSON object. Write one object a line.")
    return row


def _read_parquet(path: Path, content: bytes, names: Sequence[str]) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("Reading Parquet needs pyarrow. Run: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        _select(path, names, file.schema_arrow.names)
        table = file.read(columns=list(names))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"`{path}` is not a complete Parquet file: {error}") from error
    columns = {name: table[name].to_pylist() for name in names}
    _refuse_no_rows(path, next(iter(columns.values()), []))
    return columns


FORMATS = {".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {".bz2": bz2.BZ2File, ".gz": lambda raw: gzip.GzipFile(fileobj=raw)}
