"""A data loader that goes on exactly where it was interrupted, on any number of ranks."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_tricks.data._order import GlobalBatches, Order
from lightning_tricks.engines import ranks
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["TricksDataLoader"]


class TricksDataLoader:
    """Batches in an order pure in (seed, epoch), shared out over the ranks, resumable in mid-epoch.

    Step `i` takes the order's next `batch_size * world` samples and each rank its contiguous part, so that one device
    with `batch_size=B * W` sees the same global batches as `W` ranks with `batch_size=B`. No sample is lost or
    doubled, and every rank has the same number of batches: a last, partial global batch is split evenly, and one of
    fewer samples than ranks joins the batch before.

    The position counts the batches handed to the trainer, never those that workers hold ready. Lightning stores it in
    its checkpoints (`state_dict`) and restores it. The loader is sized, so Lightning fetches no batch ahead; it is not
    a `DataLoader`, so Lightning leaves its sampling alone; `trainer.overfit_batches` needs `shuffle=False`.

    Args:
        dataset: a map-style dataset whose samples depend on nothing but their index.
        batch_size: samples per rank and batch, at least 1.
        shuffle: a new order every epoch, or the dataset's own.
        seed: of the order, at least 0.
        drop_last: leave out the last global batch of an epoch when it is partial.
        num_workers: processes that load batches, 0 for none.
        collate_fn: makes a batch out of a list of samples; torch's default stacks tensors.

    Raises:
        MisconfigurationError: for an option out of range.
        DataError: if the dataset is empty or, once the ranks are known, too small for them.

    Example:
        >>> loader = TricksDataLoader(range(8), batch_size=2, shuffle=True, seed=7)
        >>> whole = [batch.tolist() for batch in loader]
        >>> first = next(iter(loader))
        >>> resumed = TricksDataLoader(range(8), batch_size=2, shuffle=True, seed=7)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> [batch.tolist() for batch in resumed] == whole[1:]
        True
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        _at_least("batch_size", batch_size, 1)
        _at_least("seed", seed, 0)
        _at_least("num_workers", num_workers, 0)
        self.dataset = dataset
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self._order = Order(_size(dataset), shuffle=shuffle, seed=seed)
        self._batches = GlobalBatches(self._order, batch_size, drop_last)
        self._position = (0, 0)  # epoch, batches handed out in it
        self._resumed = False

    @property
    def batch_sampler(self) -> GlobalBatches:
        """This rank's batches. Lightning sets the epoch on its `sampler`; DeepSpeed reads its `batch_size`."""
        rank, world = ranks()
        return dataclasses.replace(self._batches, rank=rank, world=world)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. Lightning calls it before every epoch."""
        self._order.set_epoch(epoch)

    def anew(self) -> "TricksDataLoader":
        """A loader of the same epoch's batches, from the first one, with a position of its own."""
        other = copy.copy(self)
        other._order = copy.copy(self._order)
        other._batches = dataclasses.replace(self._batches, sampler=other._order)
        other._position, other._resumed = (0, 0), False
        return other

    def __len__(self) -> int:
        """The number of batches of a whole epoch, the same on every rank."""
        return self.batch_sampler.total

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing is loaded before the first `next`, when Lightning has set the epoch.
        epoch = self._order.epoch
        start = self._handed_out() if self._resumed else 0
        self._position, self._resumed = (epoch, start), False
        for count, batch in enumerate(self._loader(start), start + 1):
            self._position = (epoch, count)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch, the same on every rank, with what is needed to refuse another order."""
        return {"epoch": self._order.epoch, "batches": self._handed_out(), "length": len(self), **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position that `state_dict` gave.

        Raises:
            MisconfigurationError: if the position lies within an epoch whose order was another one.
        """
        if 0 < state["batches"] < state["length"]:
            self._refuse_another_order(state)
        self.set_epoch(state["epoch"])
        self._position, self._resumed = (state["epoch"], state["batches"]), True

    def _loader(self, start: int) -> "DataLoader[Any]":
        # Its own generator: a loader leaves the global random numbers alone, so that resuming draws none too many.
        generator = torch.Generator().manual_seed(self._order.seed + self._order.epoch)
        return DataLoader(
            self.dataset,
            batch_sampler=dataclasses.replace(self.batch_sampler, start=start),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            generator=generator,
        )

    def _handed_out(self) -> int:
        epoch, batches = self._position
        return batches if epoch == self._order.epoch else 0

    def _identity(self) -> dict[str, int]:
        return {
            "global_batch_size": self.batch_sampler.global_batch_size,
            "samples": self._order.samples,
            "seed": self._order.seed,
            "shuffle": int(self._order.shuffle),
        }

    def _refuse_another_order(self, state: dict[str, int]) -> None:
        for name, now in self._identity().items():
            if state[name] != now:
                raise MisconfigurationError(
                    f"The checkpoint stands in the middle of an epoch (batch {state['batches']} of {state['length']})"
                    f" with {name}={state[name]}, but now {name}={now}: the samples seen and to come would not fit"
                    " together. Restore that value (global_batch_size is `batch_size` times devices), or resume from"
                    " a checkpoint of an epoch's end."
                )


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def _size(dataset: Dataset[Any]) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise MisconfigurationError(
            f"TricksDataLoader needs a dataset with `__len__` and `__getitem__`, got {type(dataset).__name__}."
            " Load the samples into a map-style dataset."
        )
    if len(dataset) == 0:
        raise DataError("The dataset holds no samples. Check the file and the split it comes from.")
    return len(dataset)
