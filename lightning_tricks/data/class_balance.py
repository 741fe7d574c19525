"""Epochs in which classes have the shares that they should have, of a fixed number of samples."""

import copy
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from lightning_tricks.data._order import PlainOrder
from lightning_tricks.data._plan import StepOrder, Steps, check_whole
from lightning_tricks.data.length_buckets import LengthBucketSampler
from lightning_tricks.engines import Trick
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.batching import shuffled

__all__ = ["ClassBalancedSampler"]

Strategy = Literal["oversample", "undersample", "square_root"]
STRATEGIES = ("oversample", "undersample", "square_root")


class ClassBalancedSampler:
    """Draws each class as often as its share of an epoch asks for. Give it to `TricksDataLoader(dataset, sampler=...)`.

    Shares hold in every epoch to the sample, on any number of ranks: a class whose samples are to come 2.5 times comes
    twice as a whole, and a half of it, another in every epoch, once more. With `within`, that half has the lengths of
    the class. The order is a pure function of (seed, epoch), the same on every platform, and the number of samples is
    bounded by memory only.

    Args:
        labels: the class of each sample, from 0.
        strategy: "oversample" brings every class to the largest one's count, "undersample" to the smallest one's,
            "square_root" draws as many samples as there are with shares as the square roots of the counts; or weights,
            one for each class, to which the shares are proportional. A class of weight 0 is left out.
        batch_size: samples per rank and step, 32 unless `within` is given.
        classes: how many there are; the largest label, or the weights, say so otherwise.
        seed: of the draw and the order, at least 0.
        within: a `LengthBucketSampler` of the same dataset, which cuts what was drawn into batches of like length, by a
            number of samples or a token budget.

    Attributes:
        drawn: how many samples of each class an epoch has.

    Raises:
        MisconfigurationError: for an option out of range.
        DataError: if a label is out of range, or a class that is to be drawn has no sample.

    Example:
        >>> sampler = ClassBalancedSampler([0, 0, 0, 0, 1], batch_size=4)
        >>> sampler.drawn.tolist(), np.sort(sampler.draw(0)).tolist()
        ([4, 4], [0, 1, 2, 3, 4, 4, 4, 4])

    References:
        The square root of counts: Mikolov et al., NeurIPS 2013, subsample by it; Mahajan et al., ECCV 2018.
    """

    trick: ClassVar[Trick] = Trick(jobs=("balance classes",))

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        strategy: Strategy | Sequence[float] = "oversample",
        batch_size: int | None = None,
        classes: int | None = None,
        seed: int = 0,
        within: LengthBucketSampler | None = None,
    ) -> None:
        check_whole("seed", seed, 0)
        if within is not None and batch_size is not None:
            raise MisconfigurationError(f"Pass `batch_size={batch_size}` or `within`, which has one, not both.")
        check_whole("batch_size", 32 if batch_size is None else batch_size, 1)
        if classes is None and not isinstance(strategy, str):
            classes = len(strategy)
        found = _checked(labels, classes)
        if within is not None and len(found) != within.samples:
            raise DataError(f"There are {len(found)} labels, but `within` has {within.samples} lengths.")
        self.samples, self.seed, self.strategy, self._within = len(found), seed, strategy, within
        self._fingerprint = f"{zlib.crc32(np.ascontiguousarray(found).data):08x}"
        self._members = _members(found, classes, None if within is None else within.kept)
        self.drawn = _counts(np.array([len(members) for members in self._members]), strategy)
        self._order = self._steps_of(within, 32 if batch_size is None else batch_size)

    @property
    def epoch(self) -> int:
        """The epoch whose order comes next."""
        return self._order.epoch

    @property
    def limit(self) -> int:
        """Samples or padded tokens per rank and step."""
        return self._order.limit

    @property
    def batch_size(self) -> int:
        """Samples per rank and step, on average."""
        return self._order.batch_size

    @property
    def lengths(self) -> np.ndarray | None:
        """Of all samples, if `within` has them."""
        return None if self._within is None else self._within.lengths

    @property
    def pad_to(self) -> int | Sequence[int]:
        """To what batches are padded."""
        return 1 if self._within is None else self._within.pad_to

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. Lightning calls it before every epoch."""
        self._order.set_epoch(epoch)

    def steps(self, world: int, limit: int) -> int:
        """The number of steps, the same in every epoch.

        Raises:
            DataError: if there are too few samples to give every rank one in every step.
        """
        return self._order.steps(world, limit)

    def plan(
        self, world: int, limit: int, segment: int = 0, samples: np.ndarray | None = None, steps: int | None = None
    ) -> Steps:
        """The steps of this epoch, or of what is left of it; see `LengthBucketSampler.plan`."""
        return self._order.plan(world, limit, segment, samples, steps)

    def check(self, samples: int, collate_fn: Any) -> None:
        """Refuse a dataset of another size, and what `within` refuses.

        Raises:
            DataError: if the dataset has another number of samples than there are labels.
        """
        if samples != self.samples:
            raise DataError(f"There are {self.samples} labels, but {samples} samples. Take those of this dataset.")
        if self._within is not None:
            self._within.check(samples, collate_fn)

    def identity(self) -> dict[str, Any]:
        """What decides the order, the labels' checksum among it."""
        strategy = self.strategy if isinstance(self.strategy, str) else [float(weight) for weight in self.strategy]
        within = {}
        if self._within is not None:
            within = {**self._within.identity(), "seed of `within`": self._within.seed}
        return {
            **within,
            "samples": self.samples,
            "seed": self.seed,
            "strategy": strategy,
            "fingerprint of the labels": self._fingerprint,
        }

    def draw(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, class after class."""
        return np.concatenate([self._draw_class(index, epoch) for index in range(len(self._members))])

    def longest_draw(self) -> np.ndarray:
        """Samples of which the i-th longest is no shorter than that of any epoch's draw."""
        return np.concatenate([self._draw_class(index, None) for index in range(len(self._members))])

    def __copy__(self) -> "ClassBalancedSampler":
        """The same order, with an epoch of its own."""
        other = object.__new__(ClassBalancedSampler)
        other.__dict__.update(self.__dict__, _order=copy.copy(self._order))
        return other

    def _draw_class(self, index: int, epoch: int | None) -> np.ndarray:
        """`epoch` None takes the longest that may come, one for each that is drawn."""
        members, wanted = self._members[index], int(self.drawn[index])
        whole, part = divmod(wanted, len(members)) if wanted else (0, 0)
        if not part:
            return np.tile(members, whole)
        turn = shuffled(members, (self.seed, epoch or 0, index, 1))
        if self._within is None:
            return np.concatenate([np.tile(members, whole), turn[:part]])
        # Every so manieth of the class in the order of lengths: each as likely as the others, and about as long
        # altogether in every epoch, so that every epoch can have the same number of steps.
        turn = turn[np.argsort(self._within.costs[turn], kind="stable")]
        start = len(members) - 1
        if epoch is not None:
            word = np.random.PCG64(np.random.SeedSequence([self.seed, epoch, index, 2])).random_raw(1)
            start = int(word[0]) % len(members)
        return np.concatenate([np.tile(members, whole), turn[(start + np.arange(part) * len(members)) // part]])

    def _steps_of(self, within: LengthBucketSampler | None, batch_size: int) -> StepOrder:
        return _Drawn(self, batch_size) if within is None else within.of(self)


class _Drawn(PlainOrder):
    """What a sampler draws, shuffled, in steps of `batch_size` per rank."""

    def __init__(self, sampler: ClassBalancedSampler, batch_size: int) -> None:
        super().__init__(int(sampler.drawn.sum()), batch_size=batch_size, shuffle=True, seed=sampler.seed)
        self._sampler = sampler

    def indices(self) -> np.ndarray:
        drawn = self._sampler.draw(self.epoch)
        return shuffled(drawn, (self.seed, self.epoch))


def _checked(labels: Any, classes: int | None) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise DataError(
            f"`labels` must be a sequence of whole numbers, one for each sample, got shape {found.shape} of"
            f" {found.dtype}."
        )
    wrong = np.flatnonzero((found < 0) | (found >= (np.iinfo(np.int64).max if classes is None else classes)))
    if len(wrong):
        raise DataError(
            f"Sample {wrong[0]} has label {found[wrong[0]]}, and {len(wrong) - 1} more are out of range:"
            f" labels go from 0 to {'the number of classes' if classes is None else classes} - 1."
        )
    return found


def _members(labels: np.ndarray, classes: int | None, kept: np.ndarray | None) -> list[np.ndarray]:
    count = int(labels.max()) + 1 if classes is None else classes
    # Labels of a byte or two sort many times faster.
    narrow = labels.astype(np.uint8 if count <= 1 << 8 else np.uint16 if count <= 1 << 16 else np.int64, copy=False)
    narrow = narrow if kept is None else narrow[kept]
    order = np.argsort(narrow, kind="stable").astype(np.uint32)
    order = order if kept is None else kept[order]
    return np.split(order, np.cumsum(np.bincount(narrow, minlength=count))[:-1])


def _counts(sizes: np.ndarray, strategy: Strategy | Sequence[float]) -> np.ndarray:
    """How many samples of each class to draw."""
    weights = _weights(sizes, strategy)
    if missing := np.flatnonzero((sizes == 0) & (weights > 0)).tolist():
        raise DataError(
            f"Class {missing[0]} has no sample to draw{f', nor have {len(missing) - 1} more' if missing[1:] else ''}."
            " Pass weights with 0 for it, or leave it out of the labels."
        )
    if strategy == "oversample":
        return np.full(len(sizes), sizes.max())
    if strategy == "undersample":
        return np.full(len(sizes), sizes.min())
    exact = weights / weights.sum() * sizes.sum()
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: int(sizes.sum() - counts.sum())]
    counts[most] += 1
    return counts


def _weights(sizes: np.ndarray, strategy: Strategy | Sequence[float]) -> np.ndarray:
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise MisconfigurationError(
                f"`strategy` must be one of {', '.join(STRATEGIES)}, or weights, got {strategy!r}."
            )
        return np.asarray(np.sqrt(np.maximum(sizes, 1)))
    weights = np.asarray(strategy, np.float64)
    if weights.shape != sizes.shape or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
        raise MisconfigurationError(
            f"`strategy` must hold a finite weight of at least 0 for each of {len(sizes)} classes, got {strategy!r}."
        )
    return weights
