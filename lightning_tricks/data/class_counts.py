"""How many examples each class has: counted once, from labels or from the samples, and kept."""

import json
import os
import time
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_tricks.data._fingerprint import own_fingerprint
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.storage._atomic import atomic_file

__all__ = ["count_classes"]

CHUNK = 256  # samples between two looks at the clock
PROBES = 16  # samples whose labels tell a data set from another one of its size
SAVE_EVERY = 10.0  # seconds


@overload
def count_classes(
    data: Any,
    classes: int,
    *,
    label: Callable[[Any], Any] | None = ...,
    ignore_index: int = ...,
    cache: str | Path | None = ...,
    multi_label: Literal[False] = ...,
) -> list[int]: ...


@overload
def count_classes(
    data: Any,
    classes: int,
    *,
    label: Callable[[Any], Any] | None = ...,
    ignore_index: int = ...,
    cache: str | Path | None = ...,
    multi_label: Literal[True],
) -> list[list[int]]: ...


def count_classes(
    data: Any,
    classes: int,
    *,
    label: Callable[[Any], Any] | None = None,
    ignore_index: int = -100,
    cache: str | Path | None = None,
    multi_label: bool = False,
) -> list[int] | list[list[int]]:
    """The examples per class of a training set, for `weigh_classes`.

    Labels at hand are counted at once. A data set is read sample by sample, with a progress bar on a terminal; with
    `cache`, what was counted is kept in that file, so that an interrupted pass goes on where it was and a later one
    reads the file. A data set of another size, of another fingerprint (its method `fingerprint()`, or what Hugging
    Face's datasets keep), or with other labels where it is probed, is counted anew. One without a fingerprint whose
    labels change elsewhere is not told from the old one: delete the file then. Several processes may do it at the same
    time.

    Args:
        data: the labels, as integers in an array, tensor or list of any shape; or a data set with `len()` and indices.
        classes: their number, K.
        label: gives a sample's label, or a tensor of them (one for each token); if null, it is the sample's `label` or
            `labels`, or its last element. With `multi_label` it gives K of them, each 0 or 1.
        ignore_index: the label that counts for nothing.
        cache: a JSON file.
        multi_label: whether any number of the K labels may hold of a sample; labels at hand are of shape (..., K).

    Returns:
        K counts; with `multi_label`, for each of the K labels the examples without and with it.

    Raises:
        DataError: if a label is no class; it and its place are named.
        MisconfigurationError: if `classes` is not 2 or more.

    Example:
        >>> from lightning_tricks.data import count_classes
        >>> count_classes([0, 2, 1, 0, -100], 3)
        [2, 1, 1]
        >>> import numpy as np
        >>> count_classes(np.array([[0, 1], [1, 1], [0, 1]]), 2, multi_label=True)
        [[2, 1], [0, 3]]
    """
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2 - multi_label:
        raise MisconfigurationError(f"`classes` must be their number, {2 - multi_label} or more, got {classes!r}.")
    count = _counts_of_labels if multi_label else _counts
    if label is None and (labels := _labels(data, multi_label)) is not None:
        found = count(labels, classes, ignore_index, "label")
    else:
        found = _Pass(data, classes, label or _label_of, ignore_index, cache, count).run()
    return [[int(each) for each in pair] for pair in found] if multi_label else [int(each) for each in found]


class _Pass:
    """One reading of a data set, which can be left and taken up."""

    def __init__(
        self,
        data: Any,
        classes: int,
        label: Callable[[Any], Any],
        ignore_index: int,
        cache: str | Path | None,
        count: Callable[[np.ndarray, int, int, str], np.ndarray],
    ) -> None:
        if not (isinstance(data, Sized) and hasattr(data, "__getitem__")):
            raise MisconfigurationError(
                f"`data` must be labels, or a data set with `len()` and indices; got {type(data).__name__}."
            )
        self.data, self.classes, self.label, self.ignore_index = data, classes, label, ignore_index
        self.cache, self.count = None if cache is None else Path(cache), count
        self.done, self.counts = 0, np.zeros((classes, 2) if count is _counts_of_labels else classes, np.int64)

    def run(self) -> np.ndarray:
        self._take_up()
        console = Console(stderr=True)
        starts = range(self.done, len(self.data), CHUNK)
        saved = time.monotonic()
        for start in track(starts, "Counting classes", console=console, disable=not console.is_terminal):
            for index in range(start, min(start + CHUNK, len(self.data))):
                self.counts += self._of_sample(index)
                self.done = index + 1
            if time.monotonic() - saved > SAVE_EVERY:
                self._save()
                saved = time.monotonic()
        if len(starts):
            self._save()
        return self.counts

    def _of_sample(self, index: int) -> np.ndarray:
        return self.count(np.asarray(self.label(self.data[index])), self.classes, self.ignore_index, f"sample {index}")

    def _identity(self) -> dict[str, Any]:
        places = np.linspace(0, len(self.data) - 1, PROBES if len(self.data) else 0).round()
        probes = [self._of_sample(int(place)).tolist() for place in places]
        known = {"samples": len(self.data), "classes": self.classes, "ignored": self.ignore_index}
        return {**known, "fingerprint": own_fingerprint(self.data), "probes": probes}

    def _take_up(self) -> None:
        if self.cache is None:
            return
        self.identity = self._identity()
        if self.cache.exists():
            kept = _read(self.cache)
            if kept["of"] == self.identity:
                self.done, self.counts = kept["done"], np.array(kept["counts"], np.int64)

    def _save(self) -> None:
        if self.cache is not None:
            kept = {"of": self.identity, "done": self.done, "counts": self.counts.tolist()}
            own = self.cache.with_name(f".{self.cache.name}.{os.getpid()}")  # every rank may count
            with atomic_file(own) as partial:
                partial.write_text(json.dumps(kept))
            os.replace(own, self.cache)


def _read(path: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
        if set(kept) == {"of", "done", "counts"}:
            return kept
        problem = "it holds other entries"
    except (OSError, ValueError, TypeError) as error:
        problem = str(error)
    raise DataError(f"The class counts of {path} are damaged: {problem}. Delete it; they will be counted again.")


def _labels(data: Any, multi_label: bool) -> np.ndarray | None:
    """Labels that are at hand: an array or tensor of integers, or a list of them."""
    if isinstance(data, Tensor):
        data = data.detach().cpu().numpy()
    elif isinstance(data, list) and multi_label:
        data = _rows(data)
    elif isinstance(data, Sequence) and len(data) and all(isinstance(label, int | np.integer) for label in data):
        data = np.asarray(data)
    return data if isinstance(data, np.ndarray) and data.dtype.kind in "iu" else None


def _rows(data: list[Any]) -> np.ndarray | None:
    """A list of lists of integers as one array; None for a list of samples, or of ragged rows."""
    plain = data and all(isinstance(row, list) and all(isinstance(each, int) for each in row) for row in data)
    return np.asarray(data) if plain and len({len(row) for row in data}) == 1 else None


def _label_of(sample: Any) -> Any:
    if isinstance(sample, dict):
        name = next((name for name in ("label", "labels") if name in sample), None)
        if name is None:
            raise MisconfigurationError(
                f"a sample has no `label` or `labels`, only {sorted(sample)}: pass `label`, a function that takes a "
                "sample and gives its label."
            )
        return sample[name]
    if isinstance(sample, tuple | list):
        return sample[-1]
    raise MisconfigurationError(
        f"a sample is {type(sample).__name__}, of which the label is not known: pass `label`, a function that gives it."
    )


def _counts(labels: np.ndarray, classes: int, ignore_index: int, place: str) -> np.ndarray:
    labels = labels.reshape(-1)
    return np.bincount(labels[_valid(labels, classes, ignore_index, place)], minlength=classes)


def _counts_of_labels(labels: np.ndarray, classes: int, ignore_index: int, place: str) -> np.ndarray:
    """Of shape (classes, 2): how many do not hold, and how many do."""
    if labels.ndim == 0 or labels.shape[-1] != classes:
        raise DataError(
            f"{place}: labels must be {classes}, each 0 or 1, got shape {labels.shape}. With `multi_label` every "
            "sample says of every label whether it holds."
        )
    rows = labels.reshape(-1, classes)
    valid = _valid(rows, 2, ignore_index, place)
    return np.stack([((rows == holds) & valid).sum(0) for holds in (0, 1)], axis=1)


def _valid(labels: np.ndarray, classes: int, ignore_index: int, place: str) -> np.ndarray:
    """Which of the labels count, once all are known to be classes."""
    if labels.dtype.kind not in "iu":
        raise DataError(f"{place}: labels must be whole numbers, got {labels.dtype}: {labels.flat[0]!r}.")
    valid: np.ndarray = labels != ignore_index
    wrong = np.argwhere(((labels < 0) | (labels >= classes)) & valid)
    if len(wrong):
        where = f"{place} {', '.join(map(str, wrong[0]))}" if place == "label" else f"the label of {place}"
        raise DataError(
            f"{where} is {labels[tuple(wrong[0])]}, which is no class: there are {classes}, so labels are 0 to "
            f"{classes - 1}, or {ignore_index} to be ignored."
        )
    return valid
