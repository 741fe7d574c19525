"""Give an existing data module's training batches another order, without changing its code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_tricks.data._plan import StepOrder
from lightning_tricks.data.length_buckets import LengthBucketSampler
from lightning_tricks.data.lengths import measure_lengths
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.errors import MisconfigurationError

__all__ = ["bucketed"]

D = TypeVar("D", bound=LightningDataModule)


def bucketed(
    datamodule: D,
    sampler: Callable[[np.ndarray], StepOrder] | None = None,
    *,
    length: str | Callable[[Any], int] = "input_ids",
    num_workers: int = 0,
    cache: str | Path | None = None,
) -> D:
    """Let `datamodule.train_dataloader()` give a `TricksDataLoader` of the same dataset, in batches of like length.

    The dataset, the collate function and the number of workers are those of its own loader, whose order and batches
    are dropped. Lengths are measured when the loader is first asked for. Validation and test stay as they are.

    Args:
        datamodule: whose `train_dataloader` gives one DataLoader of a map-style dataset. It is changed, and returned.
        sampler: makes the order from the lengths, such as `lambda lengths: LengthBucketSampler(lengths,
            max_tokens=4096)`; None: a `LengthBucketSampler` of the loader's own batch size.
        length: the key of a sample's sequence, or a function of a sample.
        num_workers: processes that measure.
        cache: a file to keep the lengths in.

    Raises:
        MisconfigurationError: when the loader is asked for, if its own is of another kind.

    Example:
        >>> from lightning.pytorch import LightningDataModule
        >>> class Data(LightningDataModule):
        ...     def train_dataloader(self):
        ...         return DataLoader([[1, 2, 3], [4], [5, 6, 7], [8]], batch_size=2, shuffle=True, collate_fn=list)
        >>> sorted([len(row) for row in batch] for batch in bucketed(Data(), length=len).train_dataloader())
        [[1, 1], [3, 3]]
    """
    own = datamodule.train_dataloader
    known: list[np.ndarray] = []

    def train_dataloader() -> TricksDataLoader:
        loader = own()
        if not isinstance(loader, DataLoader | TricksDataLoader):
            raise MisconfigurationError(
                f"`bucketed` needs a `train_dataloader` that gives one DataLoader, got {type(loader).__name__}."
            )
        if not known:
            known.append(measure_lengths(loader.dataset, length=length, num_workers=num_workers, cache=cache))
        make = sampler or (lambda lengths: LengthBucketSampler(lengths, batch_size=_batch_size(loader)))
        return TricksDataLoader(
            loader.dataset, sampler=make(known[0]), num_workers=loader.num_workers, collate_fn=loader.collate_fn
        )

    datamodule.train_dataloader = train_dataloader  # type: ignore[method-assign]
    return datamodule


def _batch_size(loader: Any) -> int:
    size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        raise MisconfigurationError("The data module's loader has no `batch_size`: pass `sampler`.")
    return int(size)
