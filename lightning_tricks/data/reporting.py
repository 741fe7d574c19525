"""What a loader's batches hold: how much is padding, how evenly ranks share the work, how large steps are."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_tricks.data._lengths import checked_lengths, padded
from lightning_tricks.data._report_plot import plot_report
from lightning_tricks.data.lengths import measure_lengths
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.engines import ranks as ranks_here
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["DataReport", "report"]


@dataclasses.dataclass(frozen=True)
class DataReport:
    """One epoch of a loader.

    Args:
        lengths: of the epoch's samples, in the order of training.
        counts: samples of each batch, of shape (steps, ranks).
        widths: padded length of each batch, likewise.
        tokens: real tokens of each batch, likewise.

    Example:
        >>> found = DataReport(np.array([3, 1]), np.array([[2]]), np.array([[3]]), np.array([[4]]))
        >>> round(found.waste, 2), found.useful_share
        (0.33, [0.6666666666666666])
    """

    lengths: np.ndarray
    counts: np.ndarray
    widths: np.ndarray
    tokens: np.ndarray

    @property
    def waste(self) -> float:
        """The share of padding in all tokens."""
        return 1 - float(self.tokens.sum()) / float((self.counts * self.widths).sum())

    @property
    def useful_share(self) -> list[float]:
        """By rank: its real tokens over what it could do while the slowest rank of each step computes."""
        slowest = (self.counts * self.widths).max(axis=1).sum()
        return [float(share) for share in self.tokens.sum(axis=0) / slowest]

    @property
    def tokens_per_step(self) -> tuple[int, int, int]:
        """Real tokens of a step over all ranks: the fewest, the median, the most."""
        found = self.tokens.sum(axis=1)
        return int(found.min()), int(np.median(found)), int(found.max())

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The different (samples, padded length) of batches: what `torch.compile` would compile for."""
        return sorted(set(zip(self.counts.ravel().tolist(), self.widths.ravel().tolist(), strict=True)))

    def rows(self) -> list[tuple[str, str]]:
        """The report as names and values."""
        few, usual, most = self.tokens_per_step
        low, middle, high = np.percentile(self.lengths, [5, 50, 95])
        shares = self.useful_share
        return [
            ("samples", f"{len(self.lengths):,}"),
            ("lengths", f"{low:.0f} to {high:.0f} (5% to 95%), half below {middle:.0f}, longest {self.lengths.max()}"),
            ("steps", f"{len(self.counts):,} on {self.counts.shape[1]} rank(s)"),
            ("samples per batch", f"{self.counts.min()} to {self.counts.max()}, {self.counts.mean():.1f} on average"),
            ("tokens per step", f"{few:,} to {most:,}, half below {usual:,}"),
            ("waste", f"{self.waste:.1%} of all tokens are padding"),
            ("useful share", f"{min(shares):.1%} to {max(shares):.1%} of a rank's time"),
            ("batch shapes", f"{len(self.shapes):,}"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def plot(self, axes: Any = None) -> tuple[Any, Any]:
        """Draw the lengths, and the shapes of batches.

        Args:
            axes: two axes to draw into; None: those of a new figure.

        Returns:
            The figure and the axes.

        Raises:
            MissingDependencyError: without matplotlib.
        """
        return plot_report(self, axes)


def report(
    loader: Any,
    *,
    lengths: Any = None,
    length: str | Callable[[Any], int] = "input_ids",
    ranks: int | None = None,
) -> DataReport:
    """What the batches of the loader's present epoch hold. Loads no batch, and draws no random number for good.

    Args:
        loader: a `TricksDataLoader`, or torch's own with a dataset that has a size, which counts as one rank's.
        lengths: of each sample of the dataset; None: those of the loader's sampler, else they are measured.
        length: where they are measured: the key of a sample's sequence, or a function of a sample.
        ranks: how many to report for; None: those of this process group.

    Raises:
        DataError: if there are not as many lengths as samples.
        MisconfigurationError: for another kind of loader.

    Example:
        >>> from lightning_tricks.data import LengthBucketSampler
        >>> sampler = LengthBucketSampler([1, 9, 2, 8], batch_size=2)
        >>> found = report(TricksDataLoader(["a", "b", "c", "d"], sampler=sampler))
        >>> found.widths.ravel().tolist(), round(found.waste, 2)
        ([2, 9], 0.09)
    """
    if not isinstance(loader, TricksDataLoader | DataLoader):
        raise MisconfigurationError(f"There is no report on a {type(loader).__name__}: give a DataLoader.")
    found = _lengths_of(loader, lengths, length)
    world = ranks or (ranks_here()[1] if isinstance(loader, TricksDataLoader) else 1)
    with _random_numbers_kept(loader):
        steps = list(_steps(loader, world))
    pad_to = getattr(getattr(loader, "order", None), "pad_to", 1)
    counts = np.array([[len(part) for part in step] for step in steps])
    longest = np.array([[found[part].max() for part in step] for step in steps], np.int32)
    return DataReport(
        lengths=np.concatenate([found[part] for step in steps for part in step]),
        counts=counts,
        widths=padded(longest.ravel(), pad_to).reshape(longest.shape),
        tokens=np.array([[found[part].sum(dtype=np.int64) for part in step] for step in steps]),
    )


def _lengths_of(loader: Any, lengths: Any, length: str | Callable[[Any], int]) -> np.ndarray:
    if lengths is None:
        lengths = getattr(getattr(loader, "order", None), "lengths", None)
    if lengths is None:
        lengths = measure_lengths(loader.dataset, length=length)
    found = checked_lengths(lengths)
    if len(found) != len(loader.dataset):
        raise DataError(f"There are {len(found)} lengths, but {len(loader.dataset)} samples.")
    return found


def _steps(loader: Any, world: int) -> Iterator[list[np.ndarray]]:
    if isinstance(loader, TricksDataLoader):
        plan = loader.order.plan(world, loader.order.limit)
        for step in range(len(plan)):
            yield [plan.part(step, rank, world) for rank in range(world)]
        return
    for batch in loader.batch_sampler or [[index] for index in loader.sampler]:
        yield [np.asarray(batch)]


@contextlib.contextmanager
def _random_numbers_kept(loader: Any) -> Iterator[None]:
    """Leave the random numbers as they were: torch's samplers draw from the global ones, or from a generator."""
    parts = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(part, "generator", None) for part in (*parts, getattr(parts[2], "sampler", None))]
    generators = [generator for generator in found if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        with isolate_rng(include_cuda=False):
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
