"""What an ensemble does with its members when the fit has ended: average, score, choose."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lightning_tricks.callbacks._evaluation import borrowed_weights, validate
from lightning_tricks.callbacks._given_members import GivenMembers
from lightning_tricks.callbacks._monitor import Monitor, joint
from lightning_tricks.callbacks._shelf import Shelf
from lightning_tricks.callbacks._statistics import AveragedStatistics, buffers_kept
from lightning_tricks.engines import Engine, average_stored, open_checkpoint, refuse_other_weights
from lightning_tricks.functional import Selection, greedy_selection

__all__ = ["Combiner", "FromPaths", "FromShelf", "Source"]


Found = dict[tuple[int, ...], dict[str, float]]  # what validation logged, by the places of the members


class Source(ABC):
    """Members, the best or the newest one first."""

    names: list[str]

    @abstractmethod
    def average(self, places: Sequence[int], weights: Sequence[float], out: Path) -> None:
        """Write the weighted mean of the members at some places."""

    def loadable(self, place: int) -> Path | None:
        """The weights file of one member, if it is one."""
        return None


class FromShelf(Source):
    """Members that this fit kept.

    Args:
        files: their weights files.
        steps: the optimizer steps at which they were taken.
    """

    def __init__(self, files: Sequence[Path], steps: Sequence[int]) -> None:
        self.files, self.steps = files, steps
        self.names = [str(step) for step in steps]

    def average(self, places: Sequence[int], weights: Sequence[float], out: Path) -> None:
        """Oldest first, so that what has no mean comes from the newest."""
        order = sorted(range(len(places)), key=lambda index: self.steps[places[index]])
        members = [open_checkpoint(self.files[places[i]]) for i in order]
        for member in members[1:]:
            refuse_other_weights(members[0], member)
        average_stored(members, [weights[i] for i in order], out, {})

    def loadable(self, place: int) -> Path | None:
        """Each is one."""
        return self.files[place]


class FromPaths(Source):
    """Members that were given."""

    def __init__(self, given: GivenMembers) -> None:
        self.given = given
        self.names = [str(path) for path in given.paths]

    def average(self, places: Sequence[int], weights: Sequence[float], out: Path) -> None:
        """Whatever engine wrote them."""
        self.given.average(places, weights, out)


class Combiner:
    """Averages members into a file, and scores averages inside the fit. Every method is collective.

    Args:
        trainer: in `on_train_end`.
        engine: its engine.
        shelf: gives names for scratch files.
        monitor: the metric to choose by, if there is one.
        statistics: estimates the running statistics of a mean, which are no mean of statistics.
    """

    def __init__(
        self, trainer: Trainer, engine: Engine, shelf: Shelf, monitor: Monitor | None, statistics: AveragedStatistics
    ) -> None:
        self.trainer, self.engine, self.shelf, self.monitor = trainer, engine, shelf, monitor
        self._statistics, self._means = statistics, 0
        self.mean = shelf.path(shelf.new_name("mean", trainer.global_step))
        self._raw = shelf.path(shelf.new_name("raw", trainer.global_step))

    def average(self, source: Source, places: Sequence[int], weights: Sequence[float]) -> Path:
        """Write a mean to `mean`, in place of what was there."""
        used = [(place, weight) for place, weight in zip(places, weights, strict=True) if weight > 0]
        chosen, shares = [place for place, _ in used], [weight for _, weight in used]
        self.engine.write_on_rank_zero(self.mean, lambda: source.average(chosen, shares, self.mean))
        return self.mean

    def complete(self, mean: Path) -> None:
        """Write running statistics of its own into a mean of several members, if the module has any."""
        if self._statistics.missing(self._means + 1):
            with self._borrowed(mean):
                self._estimate()
                self.engine.save_weights(mean)

    def _estimate(self) -> None:
        """Let the module, which holds a mean, have the statistics that its training batches give."""
        self._means += 1
        found = self._statistics.buffers(self.trainer, self.engine, self._means)
        with torch.no_grad():
            for buffer, values in found:
                buffer.copy_(values)

    def score(self, weights: Path) -> dict[str, float]:
        """What validation logs for the weights of a file. The module's own are afterwards what they were."""
        with self._borrowed(weights):
            return self._validated()

    def greedy(self, source: Source, scores: Sequence[float]) -> tuple[Selection | None, Found]:
        """Choose members by the greedy soup's recipe.

        Args:
            source: the members.
            scores: their own scores, as far as they are known; others are not a number.

        Returns:
            The choice, None if no score is finite; and what validation logged for all that was tried.
        """
        monitor, found = self.monitor, Found()
        if monitor is None:
            return None, found

        def together(places: Sequence[int]) -> float:
            single = source.loadable(places[0]) if len(places) == 1 else None
            self.engine.load_weights(single or self.average(source, places, [1.0] * len(places)))
            if len(places) > 1:
                self._estimate()
            found[tuple(places)] = self._validated()
            return found[tuple(places)].get(monitor.name, math.nan)

        first = source.loadable(0) or self.average(source, [0], [1.0])
        with self._borrowed(first):
            own = [score if math.isfinite(score) else together([place]) for place, score in enumerate(scores)]
            if not any(map(math.isfinite, own)):
                return None, found
            return greedy_selection(own, together, mode=monitor.mode), found

    @contextmanager
    def _borrowed(self, weights: Path) -> Iterator[None]:
        """Let the module hold the weights of a file; what it held, each rank's own buffers included, comes back."""
        with buffers_kept(self.trainer.lightning_module), borrowed_weights(self.engine, weights, self._raw):
            yield

    def clear(self) -> None:
        """Delete the mean."""
        self.shelf.evict([self.mean.name], self.engine)

    def _validated(self) -> dict[str, float]:
        found = validate(self.trainer)
        if self.monitor is not None:
            name = self.monitor.name
            mean = joint(name, found.get(name), self.trainer.lightning_module, self.engine)
            found |= {} if mean is None else {name: mean}
        return found
