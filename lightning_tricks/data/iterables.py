"""Iterable datasets as a source: Hugging Face's, or any iterables that give the same rows each time."""

import itertools
import re
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from lightning_tricks.data._plan import check_whole
from lightning_tricks.data.sources import Block, ShardedSource
from lightning_tricks.errors import DataError, DegradedWarning, MisconfigurationError

__all__ = ["IterableSource"]

BLOCK = 1000  # rows of an iterable that are held together
CURSORS = 16  # shards that are open at a time
BATCH = 100  # rows that Hugging Face's datasets give at a time


class IterableSource(ShardedSource):
    """Iterable datasets as a source: Hugging Face's, or any iterables that give the same rows each time.

    The rows of each shard are counted by reading all of them once, unless `rows` says how many there are. A row is
    reached by reading those of its shard before it, so each rank reads over at most one shard's beginning, and so does
    a resumption. The order is made here: give the dataset as it is stored, not shuffled, and finite.

    Args:
        shards: a `datasets.IterableDataset`, whose own shards are taken, or one iterable for each shard.
        rows: of each shard; None counts them.
        transform: makes a sample of a row.
        corrupted: what becomes of a shard that cannot be read to its end: "error", or "skip" with a warning, for which
            all are read once at the start, so that all ranks leave out the same.

    Raises:
        MisconfigurationError: for something else, such as an iterator, which can be read only once.
        DataError: for an empty shard, or one that cannot be read; or while reading, if a shard has another number of
            rows than was counted.

    Example:
        >>> source = IterableSource([["a", "b"], ["c"]])
        >>> source.rows.tolist(), source[2]
        ([2, 1], 'c')
    """

    def __init__(
        self,
        shards: Any,
        *,
        rows: Sequence[int] | None = None,
        transform: Callable[[Any], Any] | None = None,
        corrupted: Literal["error", "skip"] = "error",
    ) -> None:
        if corrupted not in ("error", "skip"):
            raise MisconfigurationError(f"`corrupted` must be 'error' or 'skip', got {corrupted!r}.")
        self._shards = _shards_of(shards)
        self._cursors: OrderedDict[int, tuple[int, Iterator[Any]]] = OrderedDict()  # by shard: the next row
        if rows is not None and len(rows) != len(self._shards):
            raise MisconfigurationError(f"`rows` has {len(rows)} entries for {len(self._shards)} shards.")
        self._numbers = list(range(len(self._shards)))  # of the shards as they were given
        counts, firsts = self._looked_into(rows, skip=corrupted == "skip")
        super().__init__(counts, transform=transform)
        self._checksum = zlib.crc32(repr((counts, firsts)).encode("utf-8", "surrogatepass"))

    def _looked_into(self, rows: Sequence[int] | None, *, skip: bool) -> tuple[list[int], list[str]]:
        """Each shard's number of rows, and its first one. Those to be skipped are left out."""
        counts, firsts, intact = [], [], []
        for shard in self._numbers:
            iterator = self._open(shard)
            try:
                if (row := next(iterator, self)) is self:
                    raise DataError(f"Shard {shard} is empty. Leave it out of the shards.")
                count = 1 + sum(1 for _ in iterator) if rows is None or skip else 0
            except DataError as error:
                if not skip or error.__cause__ is None:
                    raise
                warnings.warn(f"Left out of the data: {error}", DegradedWarning, stacklevel=3)
                continue
            intact.append(shard)
            firsts.append(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(row)))
            counts.append(count if rows is None else rows[shard])
            check_whole(f"rows[{shard}]", counts[-1], 1)
        self._shards, self._numbers = [self._shards[shard] for shard in intact], intact
        return counts, firsts

    def fingerprint(self) -> str:
        """By the numbers of rows and each shard's first one: what lies behind that is not seen to change."""
        return f"{self._checksum:08x}"

    def read(self, shard: int, row: int) -> Block:
        """The next rows of the shard from `row`'s thousand on.

        Raises:
            DataError: if the shard cannot be read, or has another number of rows than was counted.
        """
        first = row // BLOCK * BLOCK
        size = min(BLOCK, int(self.rows[shard]) - first)
        iterator = self._from(shard, first)
        samples = list(itertools.islice(iterator, size))
        ends = first + size == self.rows[shard]
        if len(samples) < size or (ends and next(iterator, samples) is not samples):
            word = "fewer" if len(samples) < size else "more"
            raise DataError(
                f"Shard {self._numbers[shard]} has {word} than the {self.rows[shard]} rows that were counted: the data"
                " changed, are shuffled, or share themselves out over worker processes. Give what has the"
                " same rows whenever and wherever it is read."
            )
        if not ends:
            self._cursors[shard] = first + size, iterator
            if len(self._cursors) > CURSORS:
                self._cursors.popitem(last=False)
        return Block(first, samples)

    def close(self) -> None:
        """Drop the open iterators."""
        self._cursors.clear()

    def _from(self, shard: int, row: int) -> Iterator[Any]:
        at, iterator = self._cursors.pop(shard, (0, None))
        if iterator is None or at > row:
            at, iterator = 0, self._open(shard)
        next(itertools.islice(iterator, row - at, row - at), None)  # reads over those before
        return iterator

    def _open(self, shard: int) -> Iterator[Any]:
        try:
            yield from self._shards[shard]
        except (OSError, ValueError, RuntimeError, EOFError, zlib.error) as error:
            raise DataError(
                f"Shard {self._numbers[shard]} cannot be read: {f'{error}'.rstrip('.')}. Mend it, leave it out of the"
                " shards, or pass `corrupted='skip'`."
            ) from error


class _HuggingFaceShard:
    """A shard's rows. In a worker process its `__iter__` would share them out once more; `iter` does not."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        for batch in self.dataset.iter(batch_size=BATCH):
            names = list(batch)
            for values in zip(*(batch[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))


def _shards_of(given: Any) -> list[Iterable[Any]]:
    if hasattr(given, "shard") and hasattr(given, "num_shards"):
        if getattr(given, "_distributed", None) is not None:
            raise MisconfigurationError(
                "The dataset was split by node already: ranks would have different numbers of batches. Give the whole,"
                " without `split_dataset_by_node`; StreamingSampler shares it out over the ranks."
            )
        count = int(given.num_shards)
        return [_HuggingFaceShard(given.shard(num_shards=count, index=index)) for index in range(count)]
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        for shard, each in enumerate(given):
            if not isinstance(each, Iterable) or isinstance(each, Iterator):
                raise MisconfigurationError(
                    f"Shard {shard} is a {type(each).__name__}, which cannot be read again in the next epoch. Give an"
                    " object whose `__iter__` starts anew."
                )
        return list(given)
    raise MisconfigurationError(
        f"IterableSource needs a `datasets.IterableDataset` or a list of iterables, got {type(given).__name__}."
        " Of one iterable make a list: IterableSource([iterable])."
    )
