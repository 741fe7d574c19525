"""The dataset's own order, or a shuffled one, in steps of a fixed number of samples."""

from typing import Any

import numpy as np

from lightning_tricks.data._plan import Plan
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.batching import shuffled_indices

__all__ = ["PlainOrder", "does_not_fit", "plain_steps"]

VERSION = 2  # of the shuffle: one more whenever the same seed gives another


class PlainOrder:
    """A permutation of `samples` indices, pure in (seed, epoch), or the identity, in steps of `batch_size` per rank.

    It is the same on every platform and with every version of numpy.

    The last, partial step is split as evenly as it goes. When it holds fewer samples than there are ranks it joins the
    one before, so that no rank comes away empty.

    Args:
        samples: of the dataset.
        batch_size: samples per rank and step.
        shuffle: whether to shuffle.
        seed: of the order.
        drop_last: leave out the last step when it is partial.

    Example:
        >>> plan = PlainOrder(10, batch_size=2, shuffle=False, seed=0).plan(2, 2)
        >>> [[plan.part(step, rank, 2).tolist() for step in range(3)] for rank in (0, 1)]
        [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
    """

    def __init__(self, samples: int, *, batch_size: int, shuffle: bool, seed: int, drop_last: bool = False) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    @property
    def limit(self) -> int:
        """Samples per rank and step."""
        return self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. Lightning calls it before every epoch."""
        self.epoch = epoch

    def indices(self) -> np.ndarray:
        """The whole order of this epoch."""
        if not self.shuffle:
            return np.arange(self.samples)
        return shuffled_indices(self.samples, (self.seed, self.epoch))

    def steps(self, world: int, limit: int) -> int:
        """The number of steps of an epoch.

        Raises:
            DataError: if there are too few samples to give every rank one batch.
        """
        return plain_steps(self.samples, world, limit, self.drop_last)

    def plan(
        self, world: int, limit: int, segment: int = 0, samples: np.ndarray | None = None, steps: int | None = None
    ) -> Plan:
        """The steps of this epoch, or what is left of it. The order of what is left stays as it is.

        Raises:
            MisconfigurationError: if `samples` cannot be had in so many steps.
        """
        order = self.indices() if samples is None else samples
        wanted = self.steps(world, limit) if steps is None else steps
        size = world * limit
        if samples is None and self.drop_last:
            order = order[: wanted * size]
        count = len(order)
        if wanted < 1 or count < wanted * world or count - wanted * size >= world:
            raise MisconfigurationError(does_not_fit(count, wanted, world, resumed=samples is not None))
        bounds = np.append(np.arange(wanted) * size, count)
        if bounds[-1] - bounds[-2] < world:  # too few for steps of full size: all take fewer
            bounds = np.arange(wanted + 1) * count // wanted
        return Plan(order, bounds[:-1], bounds[1:])

    def check(self, samples: int, collate_fn: Any) -> None:
        """Take any function; the loader itself gives the number of samples."""

    def identity(self) -> dict[str, Any]:
        """What decides the order."""
        version = {"order's version": VERSION} if self.shuffle else {}
        return {
            "samples": self.samples,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "drop_last": int(self.drop_last),
            **version,
        }


def plain_steps(samples: int, world: int, batch_size: int, drop_last: bool) -> int:
    """Steps of `batch_size * world` samples, the last of at least `world`.

    Raises:
        DataError: if there are too few samples to give every rank one batch.

    Example:
        >>> plain_steps(10, 2, 2, drop_last=False), plain_steps(9, 2, 2, drop_last=False)
        (3, 2)
    """
    full, rest = divmod(samples, batch_size * world)
    if not drop_last and rest >= world:
        full += 1
    if full == 0:
        raise DataError(_too_few(samples, world, batch_size, drop_last))
    return full


def does_not_fit(samples: int, steps: int, world: int, *, resumed: bool) -> str:
    """What to do when samples cannot be had in so many steps: all of an epoch, or those left after an interruption."""
    if not resumed:
        return (
            f"{samples} samples cannot be had in {steps} steps on {world} device(s). Ask for another number of steps,"
            " or leave it to the sampler."
        )
    return (
        f"The checkpoint stands in the middle of an epoch: the {samples} samples left cannot be had in the {steps}"
        f" steps that are left on {world} device(s), and Lightning counts on that number. Resume from a checkpoint of"
        " an epoch's end, or with as many devices times samples or tokens as before."
    )


def _too_few(samples: int, world: int, batch_size: int, drop_last: bool) -> str:
    if drop_last and samples >= world:
        return (
            f"{samples} samples do not fill one batch of {batch_size} on {world} device(s), and"
            " `drop_last=True` leaves partial ones out. Lower `batch_size` or set `drop_last=False`."
        )
    return (
        f"{samples} sample(s) cannot give each of {world} devices a batch. Use at most {samples} devices, or more"
        " samples."
    )
