"""Measure the lengths of a dataset's samples, once: in parallel, with a progress bar, kept in a file."""

import json
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

from lightning_tricks.data._fingerprint import own_fingerprint
from lightning_tricks.data._plan import check_whole
from lightning_tricks.data.parquet import ParquetSource
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["measure_lengths"]

CHUNK = 1024  # samples to a task
PROBES = 16  # samples that are measured again to tell a dataset from another one of its size

Length = str | Callable[[Any], int]


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
        num_workers: processes; with any, `dataset` and `length` must be picklable, and each process gets them once.
        cache: a `.npy` file: read if it is there, else written. Lengths of another dataset are refused by their number,
            by the dataset's fingerprint where it has one, by `length`'s name, and by 16 samples measured again.

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
        return _read(path, dataset, length)
    if isinstance(dataset, ParquetSource) and isinstance(length, str) and dataset.transform is None:
        lengths = dataset.column_lengths(length)  # reads nothing else
    else:
        lengths = np.fromiter(_measured(dataset, length, num_workers), np.int64, len(dataset))
    if path is not None:
        _write(path, lengths, _identity(dataset, length))
    return lengths


def _measured(dataset: Any, length: Length, num_workers: int) -> Iterator[int]:
    starts = range(0, len(dataset), CHUNK)
    if num_workers == 0:
        chunks = (_lengths(dataset, length, range(start, min(start + CHUNK, len(dataset)))) for start in starts)
        yield from _tracked(chunks, len(starts))
        return
    # The dataset goes to each process as it starts: as part of a task it would be sent with every chunk.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(num_workers, spawn, initializer=_keep, initargs=(dataset, length)) as pool:
        yield from _tracked(pool.map(_measure_chunk, starts), len(starts))


_kept: list[Any] = []  # in a worker process: what it measures


def _keep(dataset: Any, length: Length) -> None:
    _kept[:] = [dataset, length]


def _tracked(chunks: Iterable[list[int]], count: int) -> Iterator[int]:
    console = Console(stderr=True)
    for chunk in track(chunks, "Measuring lengths", total=count, console=console, disable=not console.is_terminal):
        yield from chunk


def _measure_chunk(start: int) -> list[int]:
    dataset, length = _kept
    return _lengths(dataset, length, range(start, min(start + CHUNK, len(dataset))))


def _lengths(dataset: Any, length: Length, indices: Iterable[int]) -> list[int]:
    found = []
    for index in indices:
        sample = dataset[index]
        try:
            found.append(len(sample[length]) if isinstance(length, str) else int(length(sample)))
        except (KeyError, TypeError) as error:
            raise DataError(f"The length of sample {index} cannot be had by `length={length!r}`: {error}.") from error
    return found


def _identity(dataset: Any, length: Length) -> dict[str, str | None]:
    """What tells the lengths of a dataset from those of another, besides their number."""
    name = length if isinstance(length, str) else getattr(length, "__qualname__", type(length).__qualname__)
    return {"length": name, "fingerprint": own_fingerprint(dataset)}


def _read(path: Path, dataset: Any, length: Length) -> np.ndarray:
    try:
        with path.open("rb") as file:
            lengths = np.asarray(np.load(file))
            kept = json.loads(str(np.load(file))) if file.peek(1) else {}  # older files hold lengths alone
    except (EOFError, OSError, ValueError) as error:
        raise DataError(f"The cache of lengths `{path}` is damaged: {error}. Delete it.") from error
    if lengths.shape != (len(dataset),):
        raise DataError(
            f"The cache `{path}` has {len(lengths)} lengths, the dataset {len(dataset)} samples. Delete it."
        )
    for name, now in _identity(dataset, length).items():
        if (then := kept.get(name)) is not None and then != now:
            raise DataError(f"The cache `{path}` was measured with {name}={then}, but now {name}={now}. Delete it.")
    places = np.linspace(0, len(dataset) - 1, min(PROBES, len(dataset))).round().astype(int).tolist()
    for place, found in zip(places, _lengths(dataset, length, places), strict=True):
        if found != lengths[place]:
            raise DataError(
                f"The cache `{path}` says that sample {place} has length {lengths[place]}, but it has {found}: the"
                " lengths are those of other data, or of another `length`. Delete it."
            )
    return lengths


def _write(path: Path, lengths: np.ndarray, identity: dict[str, str | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, lengths)
        np.save(file, np.array(json.dumps(identity)))  # behind the lengths: `np.load` reads these alone
    os.replace(file.name, path)
