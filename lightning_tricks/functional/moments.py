"""Means and variances of a stream, merged exactly."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["FeatureMoments"]

PART = 1 << 16  # values treated at a time: what stays in a core's cache between the passes over them


class FeatureMoments:
    """Count, mean, sum of squared deviations, least and most of each feature, in float64; NaN counts as missing.

    Args:
        features: how many.

    Example:
        >>> moments = FeatureMoments(1)
        >>> moments.add(torch.tensor([[1.0], [2.0], [torch.nan], [6.0]]))
        >>> moments.count.tolist(), moments.mean.tolist(), moments.variance().tolist()
        ([3.0], [3.0], [4.666666666666667])

    References:
        Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
    """

    def __init__(self, features: int) -> None:
        self.count = torch.zeros(features, dtype=torch.float64)
        self.mean = torch.zeros(features, dtype=torch.float64)
        self.squares = torch.zeros(features, dtype=torch.float64)
        self.least = torch.full((features,), torch.inf, dtype=torch.float64)
        self.most = torch.full((features,), -torch.inf, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in rows of shape (rows, features)."""
        rows = max(1, PART // max(1, values.shape[1]))
        for part in torch.split(values.detach().cpu(), rows):
            if len(part):
                self.merge(self._of(part.double()))

    def _of(self, rows: Tensor) -> "FeatureMoments":
        other = FeatureMoments(rows.shape[1])
        other.least, other.most = rows.amin(0), rows.amax(0)  # each many times as quick as `aminmax` over rows
        if other.least.isnan().any():
            missing = rows.isnan()
            other.count = (~missing).sum(0).double()
            other.mean = rows.masked_fill(missing, 0.0).sum(0) / other.count.clamp(min=1)
            other.squares = (rows - other.mean).masked_fill_(missing, 0.0).square_().sum(0)
            other.least = rows.masked_fill(missing, torch.inf).amin(0)
            other.most = rows.masked_fill(missing, -torch.inf).amax(0)
        else:
            other.count.fill_(len(rows))
            other.mean = rows.mean(0)
            other.squares = (rows - other.mean).square_().sum(0)
        return other

    def merge(self, other: "FeatureMoments") -> None:
        """Take in another stream's."""
        total = self.count + other.count
        share = other.count / total.clamp(min=1)
        delta = other.mean - self.mean
        self.squares = self.squares + other.squares + delta.square() * self.count * share
        self.mean = self.mean + delta * share
        self.count = total
        self.least, self.most = self.least.minimum(other.least), self.most.maximum(other.most)

    def variance(self) -> Tensor:
        """The population variance; 0 where nothing was seen."""
        return self.squares / self.count.clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors."""
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, value.clone())
