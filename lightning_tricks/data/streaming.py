"""The order of data larger than memory: shards shuffled, rows shuffled nearby, batches of like length."""

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_tricks.data._fingerprint import checksum_of
from lightning_tricks.data._lengths import TooLong, check_collator, checked_lengths, keep_within
from lightning_tricks.data._order import does_not_fit, plain_steps
from lightning_tricks.data._plan import check_whole
from lightning_tricks.data._stream_cuts import always_enough, cut_ranks
from lightning_tricks.data._stream_plan import Pools, StreamPlan, fixed_pools, pools_within
from lightning_tricks.data._stream_rows import RankRows, ShardRows
from lightning_tricks.data.sources import ShardedSource
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["StreamingSampler"]

SLACK = 100  # a hundredth of an epoch's steps to spare, so that few epochs need larger pools
LONGEST = 1 << 62
VERSIONS = {"batch_size": 1, "max_tokens": 2}  # of the order: one more whenever the same options give another


class StreamingSampler:
    """An order in which data larger than memory can be read: from shard to shard, holding a bounded number of rows.

    Give it to `TricksDataLoader(source, sampler=...)` with the same source. Each epoch shuffles the shards, gives each
    rank a contiguous part of their rows, and shuffles those within a buffer. With `lengths`, each rank sorts pools of
    `window` batches by length, cuts and shuffles their batches; the k-th longest batches of all ranks form a step.
    Every row comes once, on every rank and in every epoch in the same number of steps, in an order that depends on
    (seed, epoch) alone, the number of workers is no part of it. Batches are fixed, or go by a budget of tokens. Then
    ranks' parts are of the same cost, whatever the shards hold, and the k-th dearest batches form a step; they hold
    unequal numbers of samples, and a loss needs its global count (`LossNormalizationMixin`).

    Args:
        source: whose shards are read.
        lengths: of each row, 1 or more, to put rows of about the same length together; `measure_lengths` measures them.
        batch_size: samples per rank and step, 32 unless `max_tokens` is given.
        max_tokens: padded tokens per rank and step, instead of `batch_size`; needs `lengths`.
        window: batches per rank that are sorted together.
        buffer: rows within which a rank shuffles; 0 shuffles shards alone, None nothing, which suits validation.
        seed: of the order, at least 0.
        pad_to: the batch's length is rounded up to a multiple of this, or to the next of a few lengths.
        too_long: what becomes of a row longer than `max_tokens`: "error", "own_batch", "truncate" (the collator must
            cut it to `max_length`), or "drop".

    Attributes:
        lengths: of all rows, as they will be after a cut, None if they were not given.
        costs: the same, padded.
        kept: numbers of the rows that were not dropped, None for all.
        max_length: to what the collator must cut, None if nothing.

    Raises:
        MisconfigurationError: for an option out of range, both `batch_size` and `max_tokens`, or a budget without
            lengths.
        DataError: if there are not as many lengths as rows, or a row is too long.

    Example:
        >>> from lightning_tricks.data import IterableSource, TricksDataLoader
        >>> source = IterableSource([range(0, 5), range(5, 8)])
        >>> loader = TricksDataLoader(source, sampler=StreamingSampler(source, batch_size=3, buffer=2))
        >>> [batch.tolist() for batch in loader]
        [[5, 6, 7], [0, 1, 2], [3, 4]]

    References:
        Shuffled shards with a buffer: WebDataset (Aizman, Maltby, Breuel, IEEE Big Data 2019).
    """

    def __init__(
        self,
        source: ShardedSource,
        lengths: Sequence[int] | np.ndarray | None = None,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        window: int = 100,
        buffer: int | None = 10_000,
        seed: int = 0,
        pad_to: int | Sequence[int] = 1,
        too_long: TooLong = "error",
    ) -> None:
        if not isinstance(source, ShardedSource):
            raise MisconfigurationError(
                f"StreamingSampler needs a source of shards, got {type(source).__name__}. Wrap it:"
                " ParquetSource(files), IterableSource(dataset) or LitDataSource(folder)."
            )
        if batch_size is not None and max_tokens is not None:
            raise MisconfigurationError(f"Pass `batch_size={batch_size}` or `max_tokens={max_tokens}`, not both.")
        if max_tokens is not None and lengths is None:
            raise MisconfigurationError(
                "`max_tokens` needs `lengths`: `measure_lengths(source, length=...)` gives them."
            )
        self.by_tokens = max_tokens is not None
        self.limit = max_tokens if max_tokens is not None else 32 if batch_size is None else batch_size
        check_whole("max_tokens" if self.by_tokens else "batch_size", self.limit, 1)
        check_whole("window", window, 1)
        check_whole("buffer", 0 if buffer is None else buffer, 0)
        check_whole("seed", seed, 0)
        self.samples, self.seed, self.window, self.buffer, self.epoch = len(source), seed, window, buffer, 0
        self.pad_to, self.too_long = pad_to, too_long
        self._sizes = np.asarray(source.rows, np.int64)
        self._use_lengths(lengths)
        self._known_steps: dict[tuple[int, int], int] = {}
        source.keep((1 + self.by_tokens) * self._pool_size(self.limit) + 2 * (buffer or 0))

    def _use_lengths(self, lengths: Sequence[int] | np.ndarray | None) -> None:
        self.lengths: np.ndarray | None = None
        self.costs: np.ndarray | None = None
        self.kept: np.ndarray | None = None
        self.max_length: int | None = None
        self._mean, self._costs = 1.0, np.empty(0, np.int32)
        if lengths is None:
            return
        found = checked_lengths(lengths)
        if len(found) != self.samples:
            raise DataError(f"There are {len(found)} lengths, but {self.samples} rows. Measure those of this source.")
        longest = self.limit if self.by_tokens else LONGEST
        self.costs, self.kept, self.max_length = keep_within(found, longest, self.too_long, self.pad_to)
        self.lengths = found if self.max_length is None else np.minimum(found, self.max_length)
        self._costs = self.costs
        self._mean = float((self.costs if self.kept is None else self.costs[self.kept]).mean())

    @property
    def batch_size(self) -> int:
        """Samples per rank and step, on average."""
        return max(1, round(self.limit / self._mean)) if self.by_tokens else self.limit

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next. Lightning calls it before every epoch."""
        self.epoch = epoch

    def steps(self, world: int, limit: int) -> int:
        """The number of steps, the same in every epoch.

        Args:
            world: ranks.
            limit: samples or padded tokens per rank and step.

        Raises:
            DataError: if there are too few rows to give every rank one in every step, or too many too long ones.
        """
        count = self.samples if self.kept is None else len(self.kept)
        if not self.by_tokens or count < world:
            return plain_steps(count, world, limit if not self.by_tokens else 1, drop_last=False)
        if (world, limit) not in self._known_steps:
            enough = always_enough(self._costs if self.kept is None else self._costs[self.kept], limit, world)
            if enough is None:
                raise DataError(
                    f"{count} rows cannot be had in equally many batches within `max_tokens={limit}` on each of"
                    f" {world} devices: too many of them fill a batch alone. Raise `max_tokens`, use fewer devices, or"
                    f" leave {count % world} row(s) out."
                )
            ranks = self._ranks(self._rows((self.seed, 0), None), world, limit, None, (self.seed, 0)) or []
            needed = int(self._pools(ranks, limit, None).steps.sum())
            self._known_steps[world, limit] = min(max(enough, needed + needed // SLACK), count // world)
        return self._known_steps[world, limit]

    def plan(
        self, world: int, limit: int, segment: int = 0, samples: np.ndarray | None = None, steps: int | None = None
    ) -> StreamPlan:
        """The steps of this epoch, or of what is left of it.

        Args:
            world: ranks.
            limit: samples or padded tokens per rank and step.
            segment: interruptions of this epoch so far after which the ranks were others.
            samples: what is left, None for all.
            steps: in how many, None for `steps(world, limit)`.

        Raises:
            DataError: if there are too few rows to give every rank one in every step.
            MisconfigurationError: if `samples` cannot be had in so many steps.
        """
        wanted = self.steps(world, limit) if steps is None else steps
        key = (self.seed, self.epoch, *([segment] if segment else []))
        rows = self._rows((self.seed, self.epoch), samples)
        ranks = None
        if (
            wanted >= 1
            and len(rows) >= wanted * world
            and (self.by_tokens or len(rows) - wanted * world * limit < world)
        ):
            ranks = self._ranks(rows, world, limit, wanted, key)
        if ranks is None:
            raise MisconfigurationError(does_not_fit(len(rows), wanted, world, resumed=samples is not None))
        if self.by_tokens:
            pools = self._pools(ranks, limit, wanted)
        else:
            even = (wanted - 1) * limit >= len(rows) // world
            pools = fixed_pools(np.array([len(each) for each in ranks]), limit, self.window, wanted, even)
        return StreamPlan(ranks, pools, self.costs, None if self.buffer is None else key)

    def check(self, samples: int, collate_fn: Any) -> None:
        """Refuse a source of another size, or a collator that does not cut what must be cut.

        Raises:
            DataError: if the source has another number of rows.
            MisconfigurationError: if `too_long="truncate"` and `collate_fn.max_length` is not small enough, or
                `max_tokens` was counted with another `pad_to`.
        """
        if samples != self.samples:
            raise DataError(
                f"The sampler's source has {self.samples} rows, the loader's dataset {samples}. Give both the same."
            )
        check_collator(collate_fn, self.max_length, self.pad_to if self.by_tokens else None)

    def identity(self) -> dict[str, Any]:
        """What decides the order."""
        by, lengths = "max_tokens" if self.by_tokens else "batch_size", {}
        if self.costs is not None:
            lengths["fingerprint of the lengths"] = checksum_of(self.costs, self.kept)
        return {
            "samples": self.samples,
            "seed": self.seed,
            "window": self.window,
            "buffer": self.buffer,
            "by": by,
            "too_long": self.too_long,
            "order's version": VERSIONS[by],
            "fingerprint of the shards' sizes": f"{zlib.crc32(self._sizes.data):08x}",
            **lengths,
        }

    def _rows(self, key: tuple[int, ...], samples: np.ndarray | None) -> ShardRows:
        chosen = self.kept if samples is None else samples
        numbers = None if chosen is None else np.asarray(chosen, np.int64)
        return ShardRows(self._sizes, None if self.buffer is None else key, numbers)

    def _ranks(
        self, rows: ShardRows, world: int, limit: int, steps: int | None, key: tuple[int, ...]
    ) -> list[RankRows] | None:
        """Each rank's rows: equally many, or of the same cost. None if so many steps cannot be had."""
        bounds: np.ndarray | None = len(rows) * np.arange(world + 1) // world
        if self.by_tokens:
            bounds = cut_ranks(self._costs[rows[np.arange(len(rows))]], world, limit, steps)
        if bounds is None:
            return None
        keys = [None if self.buffer is None else (*key, rank) for rank in range(world)]
        return [RankRows(rows, *part, self.buffer or 0, own) for part, own in zip(pairwise(bounds), keys, strict=True)]

    def _pool_size(self, limit: int) -> int:
        return self.window * (max(1, round(limit / self._mean)) if self.by_tokens else limit)

    def _pools(self, ranks: list[RankRows], limit: int, steps: int | None) -> Pools:
        """Pools of `window` steps, or of more where those need more steps in all than there are to be."""
        ordered = [self._costs[rank.take(0, len(rank))] for rank in ranks]
        wider = 1
        while True:
            pools = pools_within(ordered, limit, wider * self.window, 2 * wider * self._pool_size(limit), steps)
            if pools is not None:
                return pools
            wider *= 2
