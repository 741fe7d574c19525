"""An epoch's samples cut into steps of neighbours in length: as few as may be, or as many as are wanted."""

import dataclasses

import numpy as np

from lightning_tricks.data._tails import cut_into, gather_tails
from lightning_tricks.errors import DataError
from lightning_tricks.functional.batching import cut_steps, shuffle_to_windows, split_steps

__all__ = ["Cutter"]


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts shuffled samples, sorted within windows, into steps of at least `world` samples.

    Args:
        costs: padded lengths of all samples.
        world: ranks.
        per_rank: samples per rank, or None to go by the budget.
        budget: padded tokens per rank, or None to go by `per_rank`.
    """

    costs: np.ndarray
    world: int
    per_rank: int | None
    budget: int | None

    def fewest(
        self, samples: np.ndarray | range, key: tuple[int, ...], width: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """The order, the sizes of its steps, and how wide the windows are: wider where tails of `width` will not do.

        Raises:
            DataError: if there are too few samples to give every rank one in every step.
        """
        if len(samples) < self.world:
            raise DataError(
                f"{len(samples)} sample(s) cannot give each of {self.world} devices a batch. Use at most"
                f" {len(samples)} devices, or more samples."
            )
        while True:
            order, falling = shuffle_to_windows(samples, self._costs_of(samples), key, width)
            sizes = cut_steps(falling, width, self.world, per_rank=self.per_rank, budget=self.budget)
            try:
                return *gather_tails(order, sizes, self.costs, self.world, **self._parts()), width
            except DataError:
                if width >= len(samples):
                    raise
                width *= 2

    def exactly(
        self, samples: np.ndarray | range, key: tuple[int, ...], width: int, steps: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The order and the sizes of so many steps, at most `len(samples) // world`; None if the fullest are more.

        Any number between the two will do. Windows are widened, for fewer partial steps at their ends.
        """
        while True:
            try:
                order, sizes, width = self.fewest(samples, key, width)
            except DataError:
                return None
            if len(sizes) <= steps <= int((sizes // self.world).sum()):
                return order, split_steps(sizes, steps, self.world, self._saved_by_halving(order, sizes))
            if width >= len(samples):
                break
            width *= 2
        if len(sizes) > steps:
            return None
        order, _ = shuffle_to_windows(samples, self._costs_of(samples), key, len(samples))
        return cut_into(order, self.costs, steps, self.world, **self._parts())

    def _parts(self) -> dict[str, int | None]:
        return {"per_rank": self.per_rank, "budget": self.budget}

    def _costs_of(self, samples: np.ndarray | range) -> np.ndarray:
        return self.costs if isinstance(samples, range) else self.costs[samples]

    def _saved_by_halving(self, order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Padding of each step that goes when it is halved."""
        starts, half = np.cumsum(sizes) - sizes, sizes // 2
        return np.asarray((self.costs[order[starts]].astype(np.int64) - self.costs[order[starts + half]]) * half)
