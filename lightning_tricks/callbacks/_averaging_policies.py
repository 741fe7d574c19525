"""Policies of WeightAveraging: what is averaged, and how."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import ema_decay, lerp_, mean_of

__all__ = ["EMA", "LAWA", "SWA", "AveragingPolicy", "Copies", "Interval"]

Interval = int | Literal["epoch"]
Copies = list[list[Tensor]]  # for each copy of the weights that a policy keeps, its tensors


class AveragingPolicy(ABC):
    """What WeightAveraging averages. A subclass keeps one or more copies of the weights, and says how they change."""

    every: ClassVar[Interval] = 1  # the usual interval between updates: optimizer steps, or epochs

    def begins(self, total_steps: float) -> int:
        """The first optimizer step whose weights count, of a fit of so many; counted from 1."""
        return 1

    @abstractmethod
    def update(self, copies: Copies, weights: Sequence[Tensor], updates: int) -> None:
        """Take the weights in, in place. `updates` is the number of updates before this one."""

    def average(self, copies: Copies) -> list[Tensor]:
        """The average that the copies make up; not to be written to."""
        return copies[0]


@dataclass(frozen=True)
class EMA(AveragingPolicy):
    """An exponential moving average: `average = decay * average + (1 - decay) * weights`.

    Args:
        decay: how much of the average stays at an update, in [0, 1). It forgets over about `1 / (1 - decay)` updates:
            0.999 to 0.9999 in long fits, 0.99 in short ones; with `update_every=10`, its tenth power does the same.
        warmup: while there are few updates, the decay is no more than `(1 + updates) / (warmup + updates)`, so that
            the first weights are soon forgotten: above 1; 10 is usual. 0: none.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import EMA
        >>> EMA(decay=0.99)
        EMA(decay=0.99, warmup=10.0)

    References:
        Polyak, Juditsky: Acceleration of stochastic approximation by averaging (SIAM J. Control Optim., 1992).
    """

    decay: float = 0.999
    warmup: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise MisconfigurationError(
                f"EMA's `decay` must be at least 0 and below 1, got {self.decay!r}: 1 would never move. Pass 0.999."
            )
        if not (self.warmup == 0 or (math.isfinite(self.warmup) and self.warmup > 1)):
            raise MisconfigurationError(f"EMA's `warmup` must be 0 or above 1, got {self.warmup!r}. Pass 10, or 0.")

    def update(self, copies: Copies, weights: Sequence[Tensor], updates: int) -> None:
        """One lerp over all tensors."""
        if updates == 0:
            copies.append(_copied(weights))
        else:
            lerp_(copies[0], weights, 1 - ema_decay(updates, self.decay, self.warmup))


@dataclass(frozen=True)
class SWA(AveragingPolicy):
    """The equal average of all weights from some point on: stochastic weight averaging.

    Best with a learning rate that stays constant, or cycles, from there on (`torch.optim.swa_utils.SWALR`).

    Args:
        start: where averaging starts: a fraction of the fit's optimizer steps, in [0, 1), or the number of steps before
            it, a whole number. 0.75 is the paper's.

    Raises:
        MisconfigurationError: for an option out of range, or in a fit, for a fraction of a fit without an end.

    Example:
        >>> from lightning_tricks.callbacks import SWA
        >>> SWA(start=0.75).begins(total_steps=1000)
        751

    References:
        Izmailov et al.: Averaging weights leads to wider optima and better generalization (UAI 2018).
    """

    start: int | float = 0.75
    every: ClassVar[Interval] = "epoch"

    def __post_init__(self) -> None:
        whole = isinstance(self.start, int) and not isinstance(self.start, bool) and self.start >= 0
        fraction = isinstance(self.start, float) and 0 <= self.start < 1
        if not (whole or fraction):
            raise MisconfigurationError(
                f"SWA's `start` must be a fraction in [0, 1) or a whole number of optimizer steps, got {self.start!r}."
                " Pass 0.75 to average over the last quarter."
            )

    def begins(self, total_steps: float) -> int:
        """After the part that is left out."""
        if isinstance(self.start, int):
            return self.start + 1
        if not math.isfinite(total_steps):
            raise MisconfigurationError(
                f"SWA(start={self.start}) needs to know how many optimizer steps the fit has, and it has no end: pass"
                " `start` as a number of steps, or set `Trainer(max_epochs=...)` or `max_steps`."
            )
        return math.floor(self.start * total_steps) + 1

    def update(self, copies: Copies, weights: Sequence[Tensor], updates: int) -> None:
        """One lerp over all tensors."""
        if updates == 0:
            copies.append(_copied(weights))
        else:
            lerp_(copies[0], weights, 1 / (updates + 1))


@dataclass(frozen=True)
class LAWA(AveragingPolicy):
    """The equal average of the latest `k` weights: latest weight averaging. Keeps `k` copies of them.

    Args:
        k: how many, 2 or more; 3 to 10 is usual.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import LAWA
        >>> LAWA(k=6)
        LAWA(k=6)

    References:
        Kaddour: Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging (2022).
    """

    k: int = 5
    every: ClassVar[Interval] = "epoch"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 2:
            raise MisconfigurationError(
                f"LAWA's `k` must be a whole number of weights, 2 or more, got {self.k!r}. 5 is a good start."
            )

    def update(self, copies: Copies, weights: Sequence[Tensor], updates: int) -> None:
        """The oldest gives its place to the newest."""
        if len(copies) < self.k:
            copies.append(_copied(weights))
        elif weights:
            torch._foreach_copy_(copies[updates % self.k], list(weights))

    def average(self, copies: Copies) -> list[Tensor]:
        """The mean of the copies, as new tensors."""
        return mean_of(copies)


def _copied(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().to(torch.float32, copy=True) for weight in weights]
