"""Give an existing data module's training batches another order, without changing its code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_tricks.data._loading import loading_of
from lightning_tricks.data._plan import StepOrder
from lightning_tricks.data.length_buckets import LengthBucketSampler
from lightning_tricks.data.lengths import measure_lengths
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.data.train_position import TrainPosition
from lightning_tricks.errors import MisconfigurationError

__all__ = ["bucketed"]

POSITION = "bucketed train_dataloader"  # in the data module's state, besides its own

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

    The dataset, the collate function, the workers and how they load are those of its own loader, whose order and
    batches are dropped. Lengths are measured when the loader is first asked for. Validation and test stay as they are.
    The position in the epoch is part of the data module's state.

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
    wrapped = _Bucketed(
        datamodule, sampler, lambda data: measure_lengths(data, length=length, num_workers=num_workers, cache=cache)
    )
    datamodule.setup = wrapped.setup  # type: ignore[method-assign]
    datamodule.train_dataloader = wrapped.train_dataloader  # type: ignore[method-assign]
    datamodule.state_dict = wrapped.state_dict  # type: ignore[method-assign]
    datamodule.load_state_dict = wrapped.load_state_dict  # type: ignore[method-assign]
    return datamodule


class _Bucketed:
    """What takes the place of a data module's methods."""

    def __init__(
        self,
        datamodule: LightningDataModule,
        sampler: Callable[[np.ndarray], StepOrder] | None,
        measure: Callable[[Any], np.ndarray],
    ) -> None:
        self._own_setup, self._own_loader = datamodule.setup, datamodule.train_dataloader
        self._own_state, self._load_own_state = datamodule.state_dict, datamodule.load_state_dict
        self._sampler, self._measure = sampler, measure
        self._lengths: np.ndarray | None = None
        self._position = TrainPosition(datamodule)

    def setup(self, stage: str) -> None:
        self._position.begin(stage)
        self._own_setup(stage)

    def train_dataloader(self) -> TricksDataLoader:
        loader = self._own_loader()
        if not isinstance(loader, DataLoader | TricksDataLoader):
            raise MisconfigurationError(
                f"`bucketed` needs a `train_dataloader` that gives one DataLoader, got {type(loader).__name__}."
            )
        if self._lengths is None:
            self._lengths = self._measure(loader.dataset)
        make = self._sampler or (lambda lengths: LengthBucketSampler(lengths, batch_size=_batch_size(loader)))
        order = make(self._lengths)
        return self._position.of(
            TricksDataLoader(loader.dataset, sampler=order, collate_fn=loader.collate_fn, **loading_of(loader))
        )

    def state_dict(self) -> dict[str, Any]:
        position = self._position.state()
        return {**self._own_state(), **({} if position is None else {POSITION: position})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {name: value for name, value in state_dict.items() if name != POSITION}
        if own:
            self._load_own_state(own)
        self._position.restore(state_dict.get(POSITION))


def _batch_size(loader: Any) -> int:
    size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        raise MisconfigurationError("The data module's loader has no `batch_size`: pass `sampler`.")
    return int(size)
