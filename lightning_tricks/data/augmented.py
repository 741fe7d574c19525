"""Texts that `augment` made of a file, to join the training texts that they were made of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_tricks.data._augment_rows import checksum
from lightning_tricks.data.files import read_columns, refuse_nulls
from lightning_tricks.errors import DataError

__all__ = ["Augmented", "read_augmented"]


class Augmented(NamedTuple):
    """Texts, and for each the index of the text that it was made of, int64."""

    texts: list[str]
    sources: np.ndarray


def read_augmented(path: str, text: str, label: str, texts: Sequence[str], labels: Sequence[str]) -> Augmented:
    """Read what `augment` wrote, and see that it was made of these texts.

    Args:
        path: the file.
        text: the column of texts.
        label: the column of classes.
        texts: of the file that it was made of.
        labels: their classes.

    Raises:
        DataError: if it is not such a file, or was made of other texts or classes.
    """
    columns = read_columns(path, [text, label, "source_row", "source_checksum"])
    for name, values in columns.items():
        refuse_nulls(values, name, path)
    try:
        sources = np.array([int(row) for row in columns["source_row"]], np.int64) - 1
    except ValueError as error:
        raise DataError(f"`source_row` of `{path}` is not all whole numbers: {error}. Make the file anew.") from error
    known = {row: checksum(texts[row]) for row in set(sources.tolist()) if 0 <= row < len(texts)}
    for number, (row, mark, name) in enumerate(
        zip(sources.tolist(), columns["source_checksum"], columns[label], strict=True), 1
    ):
        if known.get(row) != mark or labels[row] != str(name):
            raise DataError(
                f"Row {number} of `{path}` was not made of row {row + 1} of the data as it is now: its text or its"
                " class is another. Run `lightning-tricks augment` on this file again."
            )
    return Augmented([str(value) for value in columns[text]], sources)
