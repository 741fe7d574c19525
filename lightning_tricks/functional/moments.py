"""Means and variances of a stream, merged exactly."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["FeatureMoments"]


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
        other = FeatureMoments(values.shape[1])
        whole = values.detach().cpu().double()
        if not len(whole):
            return
        missing = whole.isnan()
        if missing.any():
            other.count = (~missing).sum(0).double()
            filled = whole.masked_fill(missing, 0.0)
            other.mean = filled.sum(0) / other.count.clamp(min=1)
            other.squares = (whole - other.mean).masked_fill(missing, 0.0).square().sum(0)
            other.least = whole.masked_fill(missing, torch.inf).amin(0)
            other.most = whole.masked_fill(missing, -torch.inf).amax(0)
        else:
            other.count.fill_(len(whole))
            other.mean = whole.mean(0)
            other.squares = (whole - other.mean).square_().sum(0)
            other.least, other.most = torch.aminmax(whole, dim=0)
        self.merge(other)

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
