"""The order in which the engines' and the matrix' models see their data."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_tricks.data import TricksDataLoader
from lightning_tricks.data._order import PlainOrder

__all__ = ["kept_shuffle"]


def kept_shuffle(dataset: Dataset, *, batch_size: int, seed: int, shuffle: bool = True, **options: Any):
    """A loader with numpy's shuffle, under which tolerances and first weights were chosen.

    The loader's own may change by its version. In another order another gradient is rounding alone, and Adam, which
    makes whole steps of any gradient, multiplies it by up to a hundred.
    """
    order = _Kept(len(dataset), batch_size=batch_size, shuffle=shuffle, seed=seed)
    return TricksDataLoader(dataset, sampler=order, **options)


class _Kept(PlainOrder):
    def indices(self) -> np.ndarray:
        if not self.shuffle:
            return super().indices()
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
