"""Measure the lengths of a dataset's samples, once: in parallel, with a progress bar, kept in a file."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch.utils.data import IterableDataset

from lightning_tricks.data._plan import check_whole
from lightning_tricks.data.parquet import ParquetSource
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["measure_lengths"]

CHUNK = 1024  # samples to a task


def measure_lengths(
    dataset: Any,
    *,
    length: str | Callable[[Any], int] = len,
    num_workers: int = 0,
    cache: str | Path | None = None,
) -> np.ndarray:
    """The length of each sample of a dataset.

    Args:
        dataset: map-style.
        length: the key of a sample's sequence, such as `"input_ids"`, or a function of a sample.
        num_workers: processes; with any, `dataset` and `length` must be picklable.
        cache: a `.npy` file: read if it is there and has as many lengths as there are samples, else written. Delete
            it when the dataset changes.

    Returns:
        int64 lengths.

    Raises:
        MisconfigurationError: for an iterable dataset, or an option out of range.
        DataError: if a sample lacks the key, or the cache is damaged or of another dataset.

    Example:
        >>> measure_lengths([{"input_ids": [1, 2]}, {"input_ids": [3]}], length="input_ids").tolist()
        [2, 1]
    """
    check_whole("num_workers", num_workers, 0)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise MisconfigurationError(
            f"`measure_lengths` needs a dataset with `__len__` and `__getitem__`, got {type(dataset).__name__}."
            " Wrap it: IterableSource([dataset]), or ParquetSource or LitDataSource of files."
        )
    path = None if cache is None else Path(cache)
    if path is not None and path.is_file():
        return _read(path, len(dataset))
    if isinstance(dataset, ParquetSource) and isinstance(length, str) and dataset.transform is None:
        lengths = dataset.column_lengths(length)  # reads nothing else
    else:
        lengths = np.fromiter(_measured(dataset, length, num_workers), np.int64, len(dataset))
    if path is not None:
        _write(path, lengths)
    return lengths


def _measured(dataset: Any, length: str | Callable[[Any], int], num_workers: int) -> Iterator[int]:
    measure = functools.partial(_measure_chunk, dataset, length)
    starts = range(0, len(dataset), CHUNK)
    if num_workers == 0:
        yield from _tracked(map(measure, starts), len(starts))
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from _tracked(pool.map(measure, starts), len(starts))


def _tracked(chunks: Iterable[list[int]], count: int) -> Iterator[int]:
    console = Console(stderr=True)
    for chunk in track(chunks, "Measuring lengths", total=count, console=console, disable=not console.is_terminal):
        yield from chunk


def _measure_chunk(dataset: Any, length: str | Callable[[Any], int], start: int) -> list[int]:
    found = []
    for index in range(start, min(start + CHUNK, len(dataset))):
        sample = dataset[index]
        try:
            found.append(len(sample[length]) if isinstance(length, str) else int(length(sample)))
        except (KeyError, TypeError) as error:
            raise DataError(f"The length of sample {index} cannot be had by `length={length!r}`: {error}.") from error
    return found


def _read(path: Path, samples: int) -> np.ndarray:
    try:
        lengths = np.load(path)
    except (EOFError, OSError, ValueError) as error:
        raise DataError(f"The cache of lengths `{path}` is damaged: {error}. Delete it.") from error
    if lengths.shape != (samples,):
        raise DataError(f"The cache `{path}` has {len(lengths)} lengths, the dataset {samples} samples. Delete it.")
    return np.asarray(lengths)


def _write(path: Path, lengths: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, lengths)
    os.replace(file.name, path)
