"""What an ensemble makes of its members."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_tricks.callbacks._monitor import Mode, checked_mode
from lightning_tricks.errors import MisconfigurationError

__all__ = ["CombinePolicy", "GreedySoup", "Predictions", "Uniform", "Weighted"]


class CombinePolicy:
    """Base of the policies: the weights of as many members, the best or the newest one first."""

    def weights(self, count: int) -> list[float]:
        """One for each member, not all 0."""
        return [1.0] * count


@dataclass(frozen=True)
class Uniform(CombinePolicy):
    """Averages the members' weights, all alike.

    Example:
        >>> from lightning_tricks.callbacks import Uniform
        >>> Uniform()
        Uniform()
    """


@dataclass(frozen=True)
class Weighted(CombinePolicy):
    """Averages the members' weights, some more than others.

    Args:
        shares: one number of 0 or more for each member, the first one above 0: of `TopK` for the best first, of other
            policies for the newest first, of paths in their order. They need not sum to 1; with fewer members than
            shares, the last shares are left out, and members beyond the shares are not in the average.

    Raises:
        MisconfigurationError: for shares out of range.

    Example:
        >>> from lightning_tricks.callbacks import Weighted
        >>> Weighted((0.5, 0.3, 0.2))
        Weighted(shares=(0.5, 0.3, 0.2))
    """

    shares: Sequence[float] = (0.5, 0.3, 0.2)

    def __post_init__(self) -> None:
        given = self.shares
        if isinstance(given, str) or not given or not all(isinstance(x, int | float) for x in given):
            raise MisconfigurationError(f"Weighted's `shares` must be numbers, got {given!r}: try (0.5, 0.3, 0.2).")
        if not all(math.isfinite(share) and share >= 0 for share in given) or given[0] <= 0:
            raise MisconfigurationError(
                f"Weighted's `shares` must be 0 or more, finite, and the first one above 0, got {given!r}."
            )
        object.__setattr__(self, "shares", tuple(map(float, given)))

    def weights(self, count: int) -> list[float]:
        """The first shares; 0 where there are none."""
        return [*self.shares, *[0.0] * count][:count]


@dataclass(frozen=True)
class GreedySoup(CombinePolicy):
    """Averages those members that do not make the average worse, taken in best first.

    Each average is validated on the fit's validation data, and each member that has no score of its own yet.

    Args:
        monitor: metric to choose by, as `validation_step` logs it.
        mode: `min` if lower is better, `max` if higher is, `auto` to tell it from the metric's name.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> from lightning_tricks.callbacks import GreedySoup
        >>> GreedySoup("val/macro_f1")
        GreedySoup(monitor='val/macro_f1', mode='auto')

    References:
        Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models (ICML 2022), recipe 1.
    """

    monitor: str = "val/loss"
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        checked_mode("GreedySoup", self.monitor, self.mode)


@dataclass(frozen=True)
class Predictions(CombinePolicy):
    """Keeps the members apart, each as a checkpoint of its own, for `inference.PredictionEnsemble` to predict with.

    Args:
        mean: what that averages: `probabilities`, or `logits` before the softmax.

    Raises:
        MisconfigurationError: for another mean.

    Example:
        >>> from lightning_tricks.callbacks import Predictions
        >>> Predictions("logits")
        Predictions(mean='logits')
    """

    mean: Literal["probabilities", "logits"] = "probabilities"

    def __post_init__(self) -> None:
        if self.mean not in ("probabilities", "logits"):
            raise MisconfigurationError(f"Predictions' `mean` must be 'probabilities' or 'logits', got {self.mean!r}.")
