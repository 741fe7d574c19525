"""The order in which samples are visited, and its division into global batches and ranks' parts."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lightning_tricks.errors import DataError

__all__ = ["GlobalBatches", "Order"]


class Order:
    """A permutation of `samples` indices, pure in (seed, epoch); the identity when not shuffled.

    Example:
        >>> order = Order(4, shuffle=True, seed=0)
        >>> first = order.indices()
        >>> order.set_epoch(1)
        >>> bool((order.indices() == first).all())
        False
    """

    def __init__(self, samples: int, *, shuffle: bool, seed: int) -> None:
        self.samples = samples
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. Lightning calls it before every epoch."""
        self.epoch = epoch

    def indices(self) -> np.ndarray:
        """The whole order of this epoch, as int64 indices."""
        if not self.shuffle:
            return np.arange(self.samples)
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)


@dataclasses.dataclass(frozen=True)
class GlobalBatches:
    """One rank's batches: its contiguous part of each global batch of `batch_size * world` samples.

    The last, partial global batch is split as evenly as it goes. When it holds fewer samples than there are ranks it
    joins the one before, so that no rank comes away empty.

    Args:
        sampler: the order. It has this name because Lightning calls `batch_sampler.sampler.set_epoch`.
        batch_size: samples per rank and batch.
        drop_last: leave out the last global batch when it is partial.
        rank: this process's rank.
        world: the number of ranks.
        start: the number of batches to leave out at the front.

    Example:
        >>> order = Order(10, shuffle=False, seed=0)
        >>> [list(GlobalBatches(order, batch_size=2, drop_last=False, rank=r, world=2)) for r in (0, 1)]
        [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
    """

    sampler: Order
    batch_size: int
    drop_last: bool
    rank: int = 0
    world: int = 1
    start: int = 0

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self.batch_size * self.world

    @property
    def total(self) -> int:
        """The number of batches of a whole epoch, the same on every rank.

        Raises:
            DataError: if there are too few samples to give every rank one batch.
        """
        full, rest = divmod(self.sampler.samples, self.global_batch_size)
        if not self.drop_last and rest >= self.world:
            full += 1
        if full == 0:
            raise DataError(self._too_few())
        return full

    def __len__(self) -> int:
        return max(0, self.total - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        order, total = self.sampler.indices(), self.total
        for step in range(self.start, total):
            stop = None if step == total - 1 and not self.drop_last else (step + 1) * self.global_batch_size
            yield self._own_part(order[step * self.global_batch_size : stop]).tolist()

    def _own_part(self, batch: np.ndarray) -> np.ndarray:
        size, larger = divmod(len(batch), self.world)
        first = self.rank * size + min(self.rank, larger)
        return batch[first : first + size + (self.rank < larger)]

    def _too_few(self) -> str:
        samples, world = self.sampler.samples, self.world
        if self.drop_last and samples >= world:
            return (
                f"{samples} samples do not fill one batch of {self.batch_size} on {world} device(s), and"
                " `drop_last=True` leaves partial ones out. Lower `batch_size` or set `drop_last=False`."
            )
        return (
            f"{samples} sample(s) cannot give each of {world} devices a batch. Use at most {samples} devices,"
            " or more samples."
        )
