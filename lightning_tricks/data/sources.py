"""Data larger than memory, as numbered shards of numbered rows: the protocol, and iterable datasets behind it."""

import abc
import itertools
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from lightning_tricks.data._plan import check_whole
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["Block", "IterableSource", "ShardedSource"]

BLOCK = 1000  # rows of an iterable that are held together
BATCH = 100  # rows that Hugging Face's datasets give at a time


class Rows(Protocol):
    """Rows that are made when they are asked for, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


class Block(NamedTuple):
    """Neighbouring rows of a shard that were read together, and the number of the first."""

    first: int
    samples: Rows


class ShardedSource(Dataset[Any], abc.ABC):
    """Rows in shards, of which a bounded number is held: the `dataset` and the `StreamingSampler` take one.

    Rows are numbered through the shards, and `source[n]` reads row n. What was read last is held, at least as many
    rows as the sampler jumps about in; each worker process holds its own. Subclass it for a format of your own: call
    `super().__init__` with the shards' sizes, and define `read` and `fingerprint`.

    Args:
        rows: of each shard, 1 or more.
        transform: makes a sample of a row; None leaves it as it is.

    Raises:
        DataError: if there is no row, or an empty shard.

    Example:
        >>> class Squares(ShardedSource):
        ...     def read(self, shard, row):
        ...         return Block(0, [(100 * shard + n) ** 2 for n in range(self.rows[shard])])
        ...     def fingerprint(self):
        ...         return "squares"
        >>> source = Squares([3, 2])
        >>> len(source), source[1], source[4]
        (5, 1, 10201)
    """

    def __init__(self, rows: Sequence[int] | np.ndarray, *, transform: Callable[[Any], Any] | None = None) -> None:
        self.rows = np.asarray(rows, np.int64)
        if not len(self.rows) or self.rows.min() < 1:
            raise DataError(f"A source needs shards of at least one row each, got {len(self.rows)} shards.")
        self.transform = transform
        self._stops = np.cumsum(self.rows)
        self._keep = 0
        self._held: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._process = os.getpid()

    @abc.abstractmethod
    def read(self, shard: int, row: int) -> Block:
        """The rows read together with this one. Mostly called for rising rows of a shard.

        Raises:
            DataError: if the shard is damaged, or has another number of rows than before. It names the shard.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """What tells other data apart, cheaply had, the same in every process: a resumed epoch needs the same."""

    def keep(self, rows: int) -> None:
        """Hold at least so many of the rows read last."""
        self._keep = max(self._keep, rows)

    def close(self) -> None:
        """Let go of what is open; another process calls it before it reads."""

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no row {index}: the source has {len(self)}.")
        shard = int(np.searchsorted(self._stops, index, side="right"))
        row = index - int(self._stops[shard] - self.rows[shard])
        block = self._block(shard, row)
        sample = block.samples[row - block.first]
        return sample if self.transform is None else self.transform(sample)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A batch's samples, read in the order in which they lie."""
        found = {index: self[index] for index in sorted(set(indices))}
        return [found[index] for index in indices]

    def __getstate__(self) -> dict[str, Any]:
        self.close()
        return {**self.__dict__, "_held": OrderedDict()}

    def _block(self, shard: int, row: int) -> Block:
        if self._process != os.getpid():  # a forked worker: an open file's position is its parent's as well
            self.close()
            self._process = os.getpid()
        for key in reversed(self._held):
            if key[0] == shard and key[1] <= row < key[1] + len(self._held[key].samples):
                self._held.move_to_end(key)
                return self._held[key]
        block = self.read(shard, row)
        self._held[shard, block.first] = block
        self._let_go()
        return block

    def _let_go(self) -> None:
        held = sum(len(block.samples) for block in self._held.values())
        while len(self._held) > 1:
            oldest = next(iter(self._held))
            held -= len(self._held[oldest].samples)
            if held < self._keep:
                return
            del self._held[oldest]


class IterableSource(ShardedSource):
    """Iterable datasets as a source: Hugging Face's, or any iterables that give the same rows each time.

    The rows of each shard are counted by reading all of them once, unless `rows` says how many there are. A row is
    reached by reading those of its shard before it, so each rank reads over at most one shard's beginning, and so does
    a resumption. The order is made here: give the dataset as it is stored, not shuffled, and finite.

    Args:
        shards: a `datasets.IterableDataset`, whose own shards are taken, or one iterable for each shard.
        rows: of each shard; None counts them.
        transform: makes a sample of a row.

    Raises:
        MisconfigurationError: for something else, such as an iterator, which can be read only once.
        DataError: for an empty shard, or while reading, if a shard has another number of rows than was counted.

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
    ) -> None:
        self._shards = _shards_of(shards)
        self._cursor: tuple[int, int, Iterator[Any]] | None = None
        if rows is not None and len(rows) != len(self._shards):
            raise MisconfigurationError(f"`rows` has {len(rows)} entries for {len(self._shards)} shards.")
        firsts, counts = [], []
        for shard in range(len(self._shards)):
            iterator = self._open(shard)
            if (row := next(iterator, self)) is self:
                raise DataError(f"Shard {shard} is empty. Leave it out of the shards.")
            firsts.append(repr(row))
            counts.append(rows[shard] if rows is not None else 1 + sum(1 for _ in iterator))
            check_whole(f"rows[{shard}]", counts[-1], 1)
        super().__init__(counts, transform=transform)
        self._checksum = zlib.crc32(repr((counts, firsts)).encode("utf-8", "surrogatepass"))

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
            raise DataError(
                f"Shard {shard} has {'fewer' if len(samples) < size else 'more'} than the {self.rows[shard]} rows that"
                " were counted: the data changed, are shuffled, or share themselves out over worker processes."
                " Give what has the same rows whenever and wherever it is read."
            )
        self._cursor = None if ends else (shard, first + size, iterator)
        return Block(first, samples)

    def close(self) -> None:
        """Drop the open iterator."""
        self._cursor = None

    def _from(self, shard: int, row: int) -> Iterator[Any]:
        if self._cursor is None or self._cursor[0] != shard or self._cursor[1] > row:
            self._cursor = shard, 0, self._open(shard)
        _, at, iterator = self._cursor
        next(itertools.islice(iterator, row - at, row - at), None)  # reads over those before
        return iterator

    def _open(self, shard: int) -> Iterator[Any]:
        try:
            yield from self._shards[shard]
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"Shard {shard} cannot be read: {error}. Mend it, or leave it out of the shards."
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
