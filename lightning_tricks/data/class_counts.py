"""How many examples each class has: counted once, from labels or from the samples, and kept."""

import json
import os
import time
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.storage._atomic import atomic_file

__all__ = ["count_classes"]

CHUNK = 256  # samples between two looks at the clock
PROBES = 16  # samples whose labels tell a data set from another one of its size
SAVE_EVERY = 10.0  # seconds


def count_classes(
    data: Any,
    classes: int,
    *,
    label: Callable[[Any], Any] | None = None,
    ignore_index: int = -100,
    cache: str | Path | None = None,
) -> list[int]:
    """The examples per class of a training set, for `weigh_classes`.

    Labels at hand are counted at once. A data set is read sample by sample, with a progress bar on a terminal; with
    `cache`, what was counted is kept in that file, so that an interrupted pass goes on where it was and a later one
    reads the file. A data set of another size, or with other labels where it is probed, is counted anew. Several
    processes may do it at the same time.

    Args:
        data: the labels, as integers in an array, tensor or list of any shape; or a data set with `len()` and indices.
        classes: their number, K.
        label: gives a sample's label, or a tensor of them (one for each token); if null, it is the sample's `label` or
            `labels`, or its last element.
        ignore_index: the label that counts for nothing.
        cache: a JSON file.

    Returns:
        K counts.

    Raises:
        DataError: if a label is no class; it and its place are named.
        MisconfigurationError: if `classes` is not 2 or more.

    Example:
        >>> from lightning_tricks.data import count_classes
        >>> count_classes([0, 2, 1, 0, -100], 3)
        [2, 1, 1]
    """
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise MisconfigurationError(f"`classes` must be their number, 2 or more, got {classes!r}.")
    if label is None and (labels := _labels(data)) is not None:
        return [int(count) for count in _counts(labels, classes, ignore_index, "label")]
    return _Pass(data, classes, label or _label_of, ignore_index, None if cache is None else Path(cache)).run()


class _Pass:
    """One reading of a data set, which can be left and taken up."""

    def __init__(
        self, data: Any, classes: int, label: Callable[[Any], Any], ignore_index: int, cache: Path | None
    ) -> None:
        if not (isinstance(data, Sized) and hasattr(data, "__getitem__")):
            raise MisconfigurationError(
                f"`data` must be labels, or a data set with `len()` and indices; got {type(data).__name__}."
            )
        self.data, self.classes, self.label, self.ignore_index, self.cache = data, classes, label, ignore_index, cache
        self.done, self.counts = 0, np.zeros(classes, np.int64)

    def run(self) -> list[int]:
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
        return [int(count) for count in self.counts]

    def _of_sample(self, index: int) -> np.ndarray:
        found = np.asarray(self.label(self.data[index])).reshape(-1)
        return _counts(found, self.classes, self.ignore_index, f"sample {index}")

    def _identity(self) -> dict[str, Any]:
        places = np.linspace(0, len(self.data) - 1, PROBES if len(self.data) else 0).round()
        probes = [self._of_sample(int(place)).tolist() for place in places]
        return {"samples": len(self.data), "classes": self.classes, "ignored": self.ignore_index, "probes": probes}

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


def _labels(data: Any) -> np.ndarray | None:
    """Labels that are at hand: an array or tensor of integers, or a list of them."""
    if isinstance(data, Tensor):
        data = data.detach().cpu().numpy()
    elif isinstance(data, Sequence) and len(data) and all(isinstance(label, int | np.integer) for label in data):
        data = np.asarray(data)
    if isinstance(data, np.ndarray) and data.dtype.kind in "iu":
        return data.reshape(-1)
    return None


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
    if labels.dtype.kind not in "iu":
        raise DataError(f"{place}: labels must be whole numbers, got {labels.dtype}: {labels.flat[0]!r}.")
    valid = labels != ignore_index
    wrong = np.flatnonzero(((labels < 0) | (labels >= classes)) & valid)
    if len(wrong):
        where = f"{place} {wrong[0]}" if place == "label" else f"the label of {place}"
        raise DataError(
            f"{where} is {labels[wrong[0]]}, which is no class: there are {classes}, so labels are 0 to {classes - 1}, "
            f"or {ignore_index} to be ignored."
        )
    return np.bincount(labels[valid], minlength=classes)
