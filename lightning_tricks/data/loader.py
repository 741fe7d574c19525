"""A data loader that goes on exactly where it was interrupted, on any number of ranks."""

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_tricks.data._fingerprint import fingerprint_of
from lightning_tricks.data._loading import Changing, check_loading, loading_of
from lightning_tricks.data._order import PlainOrder
from lightning_tricks.data._plan import RankBatches, Segment, StepOrder, check_whole, continued
from lightning_tricks.engines import ranks
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["TricksDataLoader"]

CONTENT = "fingerprint of the data"
POSITION = ("epoch", "batches", "length", "segments")  # what a state holds besides the order's identity
REMEDY = (
    "Load the samples into a map-style dataset, or stream them: source = IterableSource([dataset]), or ParquetSource or"
    " LitDataSource of files, and TricksDataLoader(source, sampler=StreamingSampler(source, batch_size=...))."
)


class TricksDataLoader:
    """Batches in an order pure in (seed, epoch), shared out over the ranks, resumable in mid-epoch.

    Step `i` takes the order's next `batch_size * world` samples and each rank its contiguous part, so that one device
    with `batch_size=B * W` sees the same global batches as `W` ranks with `batch_size=B`. No sample is lost or
    doubled, and every rank has the same number of batches: a last, partial global batch is split evenly, and one of
    fewer samples than ranks joins the batch before. A `sampler` decides otherwise which samples a step takes.

    The position counts the batches handed to the trainer, never those that workers hold ready. Lightning stores it in
    its checkpoints (`state_dict`) and restores it, on another number of ranks too: what is left of the epoch is then
    shared out anew. The loader is sized, so Lightning fetches no batch ahead; it is not a `DataLoader`, so Lightning
    leaves its sampling alone; `trainer.overfit_batches` needs `shuffle=False`.

    Args:
        dataset: a map-style dataset whose samples depend on nothing but their index. Its content is recognised when an
            epoch is resumed: by its method `fingerprint`, Hugging Face's, or a few samples.
        batch_size: samples per rank and batch, at least 1.
        shuffle: a new order every epoch, or the dataset's own.
        seed: of the order, at least 0.
        drop_last: leave out the last global batch of an epoch when it is partial.
        num_workers: processes that load batches, 0 for none.
        collate_fn: makes a batch out of a list of samples; torch's default stacks tensors.
        sampler: `LengthBucketSampler`, `ClassBalancedSampler` or `StreamingSampler`, instead of `batch_size`, `shuffle`
            and `seed`.
        pin_memory: as torch's DataLoader has it, and so are those that follow: put batches into page-locked memory.
        prefetch_factor: batches that each worker holds ready.
        persistent_workers: let workers stay from epoch to epoch.
        worker_init_fn: what each worker calls with its number when it starts.
        multiprocessing_context: how workers are started, such as "spawn".
        timeout: seconds to wait for a batch of a worker, 0 for ever.

    Raises:
        MisconfigurationError: for an option out of range, missing, or beside a sampler.
        DataError: if the dataset is empty, not the sampler's or, once the ranks are known, too small for them.

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
        batch_size: int | None = None,
        shuffle: bool | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        sampler: StepOrder | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        timeout: float = 0,
    ) -> None:
        self.dataset, self.collate_fn, self.num_workers = dataset, collate_fn, num_workers
        self.pin_memory, self.prefetch_factor, self.persistent_workers = pin_memory, prefetch_factor, persistent_workers
        self.worker_init_fn, self.timeout = worker_init_fn, timeout  # Lightning sets the former, to seed workers
        self.multiprocessing_context = multiprocessing_context
        check_loading(**loading_of(self))
        size = _size(dataset)
        if sampler is None:
            self._order: StepOrder = _plain(size, batch_size, shuffle, seed, drop_last)
        else:
            _refuse_beside_sampler(batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last or None)
            sampler.check(size, collate_fn)
            self._order = sampler
        self._taken: tuple[int, list[Segment]] = (-1, [])  # epoch, and what was handed out in it
        self._resumed = False
        self._staying: tuple[DataLoader[Any], Changing] | None = None  # whose workers persist

    @property
    def order(self) -> StepOrder:
        """What decides which samples a step takes: the `sampler`, or the plain order."""
        return self._order

    @property
    def batch_sampler(self) -> RankBatches:
        """This rank's batches. Lightning sets the epoch on its `sampler`; DeepSpeed reads its `batch_size`."""
        return RankBatches(self._order, (self._fresh(),), ranks()[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. Lightning calls it before every epoch."""
        self._order.set_epoch(epoch)

    def anew(self) -> "TricksDataLoader":
        """A loader of the same epoch's batches, from the first one, with a position of its own."""
        other = copy.copy(self)
        other._order = copy.copy(self._order)
        other._taken, other._resumed, other._staying = (-1, []), False, None
        return other

    def __len__(self) -> int:
        """The number of batches of a whole epoch, the same on every rank and in every epoch."""
        return self._order.steps(ranks()[1], self._order.limit)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing is loaded before the first `next`, when Lightning has set the epoch.
        segments = self._handed_out() if self._resumed else [self._fresh()]
        self._taken, self._resumed = (self._order.epoch, segments), False
        world, limit, start = segments[-1]
        loader = self._loader(tuple(segments))
        for count, batch in enumerate(loader, start + 1):
            segments[-1] = (world, limit, count)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, the same on every rank, with what is needed to refuse another order."""
        segments = self._handed_out()
        return {
            "epoch": self._order.epoch,
            "batches": sum(steps for _, _, steps in segments),
            "length": len(self),
            "segments": [list(segment) for segment in segments],
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave, on these ranks.

        Raises:
            MisconfigurationError: if the position lies within an epoch of other data or of another order, or what is
                left of it cannot be shared out over these ranks in the number of steps that Lightning expects.
        """
        self.set_epoch(state["epoch"])
        if 0 < state["batches"] < state["length"]:
            self._refuse_another_order(state)
            segments = self._onto_these_ranks([(w, limit, steps) for w, limit, steps in state["segments"]])
        else:
            segments = [(*self._fresh()[:2], len(self) if state["batches"] else 0)]
        self._taken, self._resumed = (state["epoch"], segments), True

    def _loader(self, segments: tuple[Segment, ...]) -> "DataLoader[Any]":
        batches = RankBatches(self._order, segments, ranks()[0])
        if not self.persistent_workers:
            return self._made(batches)
        if self._staying is None:
            changing = Changing()
            self._staying = self._made(changing), changing
        self._staying[1].batches = batches
        return self._staying[0]

    def _made(self, batches: Any) -> "DataLoader[Any]":
        # Its own generator: a loader leaves the global random numbers alone, so that resuming draws none too many.
        generator = torch.Generator().manual_seed(self._order.seed + self._order.epoch)
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate_fn,
            generator=generator,
            **loading_of(self),
        )

    def _fresh(self) -> Segment:
        return ranks()[1], self._order.limit, 0

    def _handed_out(self) -> list[Segment]:
        epoch, segments = self._taken
        return list(segments) if epoch == self._order.epoch else [self._fresh()]

    def _onto_these_ranks(self, segments: list[Segment]) -> list[Segment]:
        here = self._fresh()
        if segments[-1][:2] == here[:2]:
            return segments
        segments = [segment for segment in segments if segment[2]] + [here]
        continued(self._order, segments)  # raises now, not in the first step
        return segments

    def _identity(self) -> dict[str, Any]:
        known = {} if self._fingerprint is None else {CONTENT: self._fingerprint}
        return {**self._order.identity(), **known}

    @cached_property
    def _fingerprint(self) -> str | None:
        """Had when a position is first stored or restored: it may read some samples."""
        return fingerprint_of(self.dataset)

    def _refuse_another_order(self, state: dict[str, Any]) -> None:
        here = self._identity()
        for name in [*here, *(name for name in state if name not in here and name not in POSITION)]:
            if name == CONTENT and (name not in state or name not in here):
                continue  # saved when the dataset gave none, or it gives none any more
            before, now = state.get(name), here.get(name)
            if before != now:
                raise MisconfigurationError(
                    f"The checkpoint stands in the middle of an epoch (batch {state['batches']} of {state['length']})"
                    f" with {name}={before}, but now {name}={now}: the samples seen and to come would not fit"
                    " together. Restore that value, or resume from a checkpoint of an epoch's end."
                )


def _plain(size: int, batch_size: int | None, shuffle: bool | None, seed: int | None, drop_last: bool) -> PlainOrder:
    if batch_size is None or shuffle is None or seed is None:
        missing = [n for n, v in (("batch_size", batch_size), ("shuffle", shuffle), ("seed", seed)) if v is None]
        raise MisconfigurationError(f"Pass {', '.join(f'`{name}`' for name in missing)}, or a `sampler` instead.")
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0)
    return PlainOrder(size, batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)


def _refuse_beside_sampler(**options: Any) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise MisconfigurationError(f"`{given[0]}` is the sampler's: pass it there, not to TricksDataLoader as well.")


def _size(dataset: Dataset[Any]) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):  # litdata's has one
        raise MisconfigurationError(
            f"TricksDataLoader needs a dataset with `__len__` and `__getitem__`, got {type(dataset).__name__}. {REMEDY}"
        )
    if len(dataset) == 0:
        raise DataError("The dataset holds no samples. Check the file and the split it comes from.")
    return len(dataset)
