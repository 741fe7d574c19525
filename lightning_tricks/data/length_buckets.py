"""Batches of samples of about the same length: shuffled, with little padding, and of equal cost on every rank."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lightning_tricks.data._cutting import Cutter
from lightning_tricks.data._fingerprint import checksum_of
from lightning_tricks.data._lengths import TooLong, check_collator, checked_lengths, keep_within
from lightning_tricks.data._order import does_not_fit
from lightning_tricks.data._plan import Plan, check_whole
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.batching import shuffled_indices

__all__ = ["Draw", "LengthBucketSampler"]

SLACK = 100  # a hundredth of an epoch's steps to spare, which lets every epoch have the same number of them
LONGEST = 1 << 62
VERSION = 2  # of the order: one more whenever the same options give another


class Draw(Protocol):
    """What chooses the samples of an epoch, some of them several times."""

    def draw(self, epoch: int) -> np.ndarray:
        """Indices of the epoch's samples, as many in every epoch."""

    def longest_draw(self) -> np.ndarray:
        """Indices of samples of which the i-th longest is no shorter than that of any epoch's draw."""


class LengthBucketSampler:
    """Maxi-batches: shuffle, sort by length inside windows, cut steps, shuffle the steps.

    Give it to `TricksDataLoader(dataset, sampler=...)`. A step takes neighbours in the sorted window for all ranks, so
    that the ranks' batches cost about the same. With `batch_size` they hold equally many samples, or one more; with
    `max_tokens` a batch's samples times its longest padded one stay within the budget, and ranks hold as many as make
    that product as equal as it goes: a loss then needs its global count (`LossNormalizationMixin`).

    Every epoch takes every sample once, in the same number of steps: where a shuffle needs fewer, the steps that
    pad most are split; where it needs more, that epoch's windows are wider. The order is a pure function of (seed,
    epoch), the same on every platform.

    Args:
        lengths: of each sample of the dataset, 1 or more; `measure_lengths` measures them.
        batch_size: samples per rank and step, 32 unless `max_tokens` is given.
        max_tokens: padded tokens per rank and step, instead of `batch_size`.
        window: about how many batches are sorted together, per rank; 1 does not sort beyond a batch, 100 pads little,
            more pads hardly less and shuffles less.
        seed: of the order, at least 0.
        pad_to: the batch's length is rounded up to a multiple of this, or to the next of a few lengths; give the
            collator the same.
        too_long: what becomes of a sample longer than `max_tokens`: "error", "own_batch" (exceeding the budget),
            "truncate" (the collator must cut it to `max_length`), or "drop".

    Attributes:
        lengths: of all samples, as they will be after a cut.
        costs: the same, padded.
        kept: indices of the samples that were not dropped, None for all.
        max_length: to what the collator must cut, None if nothing.
        dropped: how many samples were dropped.

    Raises:
        MisconfigurationError: for an option out of range, or both `batch_size` and `max_tokens`.
        DataError: for lengths that are not whole numbers from 1 on, or a sample that is too long.

    Example:
        >>> sampler = LengthBucketSampler([5, 2, 4, 1, 3, 2], max_tokens=8, window=1)
        >>> plan = sampler.plan(world=1, limit=8)
        >>> [plan.part(step, 0, 1).tolist() for step in range(len(plan))]
        [[3], [4, 5], [0], [2, 1]]

    References:
        The mechanism is known from machine translation: Marian's maxi-batches (Junczys-Dowmunt et al., ACL 2018
        demonstrations) and fairseq's token budget (Ott et al., NAACL 2019 demonstrations).
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        window: int = 100,
        seed: int = 0,
        pad_to: int | Sequence[int] = 1,
        too_long: TooLong = "error",
    ) -> None:
        if batch_size is not None and max_tokens is not None:
            raise MisconfigurationError(f"Pass `batch_size={batch_size}` or `max_tokens={max_tokens}`, not both.")
        self.by_tokens = max_tokens is not None
        self.limit = max_tokens if max_tokens is not None else 32 if batch_size is None else batch_size
        check_whole("max_tokens" if self.by_tokens else "batch_size", self.limit, 1)
        check_whole("window", window, 1)
        check_whole("seed", seed, 0)
        found = checked_lengths(lengths)
        self.samples, self.seed, self.window, self.epoch = len(found), seed, window, 0
        self.pad_to, self.too_long = pad_to, too_long
        self.costs, self.kept, self.max_length = keep_within(
            found, self.limit if self.by_tokens else LONGEST, too_long, pad_to
        )
        self.lengths = found if self.max_length is None else np.minimum(found, self.max_length)
        self.dropped = 0 if self.kept is None else self.samples - len(self.kept)
        self._mean = float(self.costs.mean() if self.kept is None else self.costs[self.kept].mean())
        self._draw: Draw | None = None
        self._known_steps: dict[tuple[int, int], int] = {}

    @property
    def batch_size(self) -> int:
        """Samples per rank and step, on average."""
        return self._samples_per_rank(self.limit)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. Lightning calls it before every epoch."""
        self.epoch = epoch

    def steps(self, world: int, limit: int) -> int:
        """The number of steps, the same in every epoch.

        Args:
            world: ranks.
            limit: samples or padded tokens per rank and step.

        Raises:
            DataError: if there are too few samples to give every rank one in every step.
        """
        if (world, limit) not in self._known_steps:
            samples, cutter = self._samples(0), self._cutter(world, limit)
            sizes = cutter.fewest(samples, (self.seed, 0), self._width(len(samples), world, limit))[1]
            least = len(sizes) + (len(sizes) // SLACK if self.by_tokens else 0)
            if self._draw is not None:
                longest = self._draw.longest_draw()
                least = max(least, len(cutter.fewest(longest, (self.seed, 0), len(longest))[1]))
            # One sort of a whole epoch needs no more steps than its windows do, and can be cut into any number from
            # there to this one; it is the same in every epoch, or no longer than that of the longest draw.
            self._known_steps[world, limit] = min(least, len(samples) // world)
        return self._known_steps[world, limit]

    def plan(
        self, world: int, limit: int, segment: int = 0, samples: np.ndarray | None = None, steps: int | None = None
    ) -> Plan:
        """The steps of this epoch, or of what is left of it.

        Args:
            world: ranks.
            limit: samples or padded tokens per rank and step.
            segment: interruptions of this epoch so far after which the ranks were others.
            samples: what is left, None for all.
            steps: in how many, None for `steps(world, limit)`.

        Raises:
            DataError: if there are too few samples to give every rank one in every step.
            MisconfigurationError: if `samples` cannot be had in so many steps.
        """
        wanted = self.steps(world, limit) if steps is None else steps
        found = self._samples(self.epoch) if samples is None else samples
        key = (self.seed, self.epoch, *([segment] if segment else []))
        made = None
        if wanted >= 1 and len(found) >= wanted * world:
            made = self._cutter(world, limit).exactly(found, key, self._width(len(found), world, limit), wanted)
        if made is None:
            raise MisconfigurationError(does_not_fit(len(found), wanted, world, resumed=samples is not None))
        order, sizes = made
        stops = np.cumsum(sizes)
        turn = shuffled_indices(wanted, (*key, wanted))
        costs = self.costs if self.by_tokens else None
        return Plan(order, (stops - sizes)[turn], stops[turn], rotate=True, costs=costs, budget=limit)

    def check(self, samples: int, collate_fn: Any) -> None:
        """Refuse a dataset of another size, or a collator that does not cut what must be cut.

        Raises:
            DataError: if the dataset has another number of samples than there are lengths.
            MisconfigurationError: if `too_long="truncate"` and `collate_fn.max_length` is not small enough, or
                `max_tokens` was counted with another `pad_to`.
        """
        if samples != self.samples:
            raise DataError(
                f"There are {self.samples} lengths, but {samples} samples. Measure the lengths of this dataset."
            )
        check_collator(collate_fn, self.max_length, self.pad_to if self.by_tokens else None)

    def identity(self) -> dict[str, Any]:
        """What decides the order, a checksum of the lengths and of what is not dropped among it."""
        by = "max_tokens" if self.by_tokens else "batch_size"
        return {
            "samples": self.samples,
            "seed": self.seed,
            "window": self.window,
            "by": by,
            "too_long": self.too_long,
            "order's version": VERSION,
            "fingerprint of the lengths": checksum_of(self.costs, self.kept),
        }

    def of(self, draw: Draw) -> "LengthBucketSampler":
        """A sampler of the same options whose epochs consist of what `draw` chooses."""
        other = object.__new__(LengthBucketSampler)
        other.__dict__.update(self.__dict__, _draw=draw, _known_steps={})
        return other

    def _samples(self, epoch: int) -> np.ndarray | range:
        if self._draw is not None:
            return self._draw.draw(epoch)
        return range(self.samples) if self.kept is None else self.kept

    def _samples_per_rank(self, limit: int) -> int:
        return max(1, round(limit / self._mean)) if self.by_tokens else limit

    def _width(self, samples: int, world: int, limit: int) -> int:
        """Samples to a window, of whole steps. All are about as wide: a short one at the end would pad more."""
        step = world * self._samples_per_rank(limit)
        windows = max(1, round(samples / (self.window * step)))
        return step if self.window == 1 else -(-samples // (windows * step)) * step

    def _cutter(self, world: int, limit: int) -> Cutter:
        return Cutter(self.costs, world, None if self.by_tokens else limit, limit if self.by_tokens else None)
