"""An epoch as steps of samples, how ranks share a step, and how an epoch goes on after an interruption."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional.batching import share_out

__all__ = ["Plan", "RankBatches", "Segment", "StepOrder", "Steps", "check_whole", "continued"]

BLOCK = 1 << 14  # samples, about, whose steps are looked up together

# Of an epoch, what was trained on the same ranks: how many ranks, samples or tokens per rank, steps taken.
Segment = tuple[int, int, int]


class Steps(Protocol):
    """The steps of an epoch, or of what is left of it."""

    def __len__(self) -> int: ...

    def part(self, step: int, rank: int, world: int) -> np.ndarray:
        """A rank's samples in a step."""

    def batches(self, rank: int, world: int, step: int = 0) -> Iterator[list[int]]:
        """A rank's samples in `step` and all after it, as lists."""

    def rest(self, step: int) -> np.ndarray:
        """The samples of `step` and all after it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of an epoch: step `i` takes the samples `order[starts[i]:stops[i]]`.

    Args:
        order: indices of samples.
        starts: of each step, in the order of training.
        stops: of each step.
        rotate: whether the ranks take turns in having a step's first samples, which are the longest.
        costs: padded lengths of all samples, where ranks' parts are to cost the same; None: hold equally many.
        budget: what no part's samples times the longest exceed then.

    Example:
        >>> plan = Plan(np.array([4, 2, 0, 1, 3]), np.array([2, 0]), np.array([5, 2]))
        >>> [plan.part(step, rank, 2).tolist() for step in (0, 1) for rank in (0, 1)]
        [[0, 1], [3], [4], [2]]
        >>> plan.rest(1).tolist()
        [4, 2]
    """

    order: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    rotate: bool = False
    costs: np.ndarray | None = None
    budget: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    def part(self, step: int, rank: int, world: int) -> np.ndarray:
        """A rank's samples in a step: a contiguous part, as even as it goes."""
        start, stop = int(self.starts[step]), int(self.stops[step])
        place = (rank + step) % world if self.rotate else rank
        if self.costs is not None and world > 1:
            starts = share_out(self.costs[self.order[start:stop]], world, self.budget)
            return self.order[start + starts[place] : start + [*starts, stop - start][place + 1]]
        size, larger = divmod(stop - start, world)
        first = start + place * size + min(place, larger)
        return self.order[first : first + size + (place < larger)]

    def batches(self, rank: int, world: int, step: int = 0) -> Iterator[list[int]]:
        """A rank's parts of `step` and all after it, as lists: `part` for many steps at a time."""
        together = max(1, BLOCK * len(self) // max(1, len(self.order)))
        for begin in range(step, len(self), together):
            block = range(begin, min(begin + together, len(self)))
            if self.costs is not None and world > 1:
                for each in block:
                    yield self.part(each, rank, world).tolist()
                continue
            firsts, lasts = self._bounds(block, rank, world)
            low, high = int(firsts[0]), int(lasts[-1])
            if world == 1 and bool((firsts[1:] == lasts[:-1]).all()):  # one after the other: a single list is cut up
                samples = self.order[low:high].tolist()
                for first, last in zip((firsts - low).tolist(), (lasts - low).tolist(), strict=True):
                    yield samples[first:last]
                continue
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                yield self.order[first:last].tolist()

    def _bounds(self, block: range, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """Where a rank's parts of some steps begin and end in the order."""
        starts, stops = self.starts[block.start : block.stop], self.stops[block.start : block.stop]
        place = (rank + np.arange(block.start, block.stop)) % world if self.rotate else np.full(len(block), rank)
        sizes, larger = np.divmod(stops - starts, world)
        firsts = starts + place * sizes + np.minimum(place, larger)
        return firsts, firsts + sizes + (place < larger)

    def rest(self, step: int) -> np.ndarray:
        """The samples of `step` and all after it."""
        parts = [self.order[a:b] for a, b in zip(self.starts[step:], self.stops[step:], strict=True)]
        return np.concatenate(parts) if parts else self.order[:0]


class StepOrder(Protocol):
    """What decides which samples a step takes. An epoch's plan is a pure function of its arguments and options."""

    samples: int  # of the dataset that the indices are of
    epoch: int
    seed: int

    @property
    def limit(self) -> int:
        """Samples or padded tokens per rank and step, whichever the steps go by."""

    @property
    def batch_size(self) -> int:
        """Samples per rank and step, on average: what DeepSpeed reports."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""

    def steps(self, world: int, limit: int) -> int:
        """The number of steps, the same in every epoch.

        Raises:
            DataError: if there are too few samples.
        """

    def plan(
        self, world: int, limit: int, segment: int = 0, samples: np.ndarray | None = None, steps: int | None = None
    ) -> Steps:
        """The steps of this epoch, or of what is left of it after `segment` interruptions: `samples` in `steps`.

        Raises:
            MisconfigurationError: if `samples` cannot be had in so many steps.
        """

    def check(self, samples: int, collate_fn: Any) -> None:
        """Refuse a dataset of another size, or a function that does not make the batches which the steps are cut for.

        Raises:
            DataError: if the dataset has another number of samples.
            MisconfigurationError: if `collate_fn` does not cut what is too long, where it should.
        """

    def identity(self) -> dict[str, Any]:
        """What must not change between an interruption in mid-epoch and the resumption, besides ranks and limit."""


def continued(order: StepOrder, segments: Sequence[Segment]) -> tuple[Steps, int]:
    """The plan of the last of `segments`, and the steps taken before it.

    Each segment shares out anew what the ones before it left, so that the epoch as a whole takes every sample once,
    in as many steps as an epoch on the last segment's ranks has: Lightning counts on that number.

    Raises:
        MisconfigurationError: if what is left does not fit into the steps that are left.
    """
    plan: Steps | None = None
    done = taken = 0
    for index, (world, limit, steps) in enumerate(segments):
        if plan is None:
            plan = order.plan(world, limit)
        else:
            done += taken
            plan = order.plan(world, limit, index, plan.rest(taken), order.steps(world, limit) - done)
        taken = steps
    if plan is None:
        raise MisconfigurationError("An epoch has at least one segment.")
    return plan, done


@dataclasses.dataclass(frozen=True)
class RankBatches:
    """One rank's batches from a step of the epoch on.

    Args:
        sampler: the order. It has this name because Lightning calls `batch_sampler.sampler.set_epoch`.
        segments: what of the epoch was trained elsewhere, and on these ranks.
        rank: this process's rank.
    """

    sampler: StepOrder
    segments: tuple[Segment, ...]
    rank: int

    @property
    def batch_size(self) -> int:
        """Samples per rank and step, on average."""
        return self.sampler.batch_size

    def __len__(self) -> int:
        world, limit, _ = self.segments[-1]
        return self.sampler.steps(world, limit) - sum(steps for _, _, steps in self.segments)

    def __iter__(self) -> Iterator[list[int]]:
        world, _, start = self.segments[-1]
        plan, _ = continued(self.sampler, self.segments)
        yield from plan.batches(self.rank, world, start)


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse an option that is no whole number of at least `least`.

    Raises:
        MisconfigurationError: naming the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise MisconfigurationError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
