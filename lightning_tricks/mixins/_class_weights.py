"""How counts become class weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional import (
    balanced_weights,
    checked_weights,
    effective_number_weights,
    inverse_square_root_weights,
)

__all__ = [
    "Balanced",
    "ClassWeights",
    "EffectiveNumber",
    "ExplicitWeights",
    "InverseSquareRoot",
]

Counts = Sequence[int] | Tensor


class ClassWeights(Protocol):
    """A rule that makes weights of counts. One of your own is a class with this method."""

    def weights(self, counts: Counts) -> Tensor:
        """The weight of each class, fp32, of shape (K,), given the examples per class in the training set."""
        ...


@dataclass(frozen=True)
class Balanced:
    """Weights that give every class the same share of the loss: `n / (K * n_c)`.

    Example:
        >>> from lightning_tricks.mixins import Balanced
        >>> Balanced().weights([50, 30, 20])
        tensor([0.6667, 1.1111, 1.6667])

    References:
        King, Zeng: Logistic regression in rare events data (Political Analysis, 2001).
    """

    def weights(self, counts: Counts) -> Tensor:
        """The weight of each class, fp32, given the examples per class in the training set."""
        return balanced_weights(counts)


@dataclass(frozen=True)
class EffectiveNumber:
    """Weights by the effective number of examples: between equal ones (`beta` 0) and balanced ones (`beta` towards 1).

    Args:
        beta: in [0, 1); 0.9 to 0.9999 is usual: the larger the classes, the closer to 1.

    Example:
        >>> from lightning_tricks.mixins import EffectiveNumber
        >>> EffectiveNumber(0.9).weights([50, 30, 20])
        tensor([0.9459, 0.9827, 1.0713])

    References:
        Cui et al.: Class-balanced loss based on effective number of samples (CVPR 2019).
    """

    beta: float = 0.999

    def __post_init__(self) -> None:
        effective_number_weights([1, 1], self.beta)

    def weights(self, counts: Counts) -> Tensor:
        """The weight of each class, fp32, given the examples per class in the training set."""
        return effective_number_weights(counts, self.beta)


@dataclass(frozen=True)
class InverseSquareRoot:
    """Weights inverse to the square root of the counts: half way to balance.

    Example:
        >>> from lightning_tricks.mixins import InverseSquareRoot
        >>> InverseSquareRoot().weights([100, 25, 4])
        tensor([0.3750, 0.7500, 1.8750])

    References:
        Mahajan et al.: Exploring the limits of weakly supervised pretraining (ECCV 2018), which samples so.
    """

    def weights(self, counts: Counts) -> Tensor:
        """The weight of each class, fp32, given the examples per class in the training set."""
        return inverse_square_root_weights(counts)


@dataclass(frozen=True)
class ExplicitWeights:
    """Weights of your own.

    Args:
        values: one for each class, above 0; for K labels one for those without and one for those with, the same two
            for all labels, or K such pairs; or a JSON file that holds a list of them.

    Raises:
        DataError: for a file that cannot be read.

    Example:
        >>> from lightning_tricks.mixins import ExplicitWeights
        >>> ExplicitWeights([1.0, 1.5, 4.0]).weights([50, 30, 20])
        tensor([1.0000, 1.5000, 4.0000])
    """

    values: Sequence[float] | Sequence[Sequence[float]] | Tensor | str | Path

    def weights(self, counts: Counts) -> Tensor:
        """The weights, fp32, one for each of the counts."""
        return checked_weights(self._values(), len(counts))

    def of_labels(self, labels: int) -> Tensor:
        """The weights of labels without and with each, fp32, of shape (labels, 2)."""
        values = self._values()
        if not (len(values) and all(isinstance(each, Sequence) or getattr(each, "ndim", 0) for each in values)):
            return checked_weights(values, 2).repeat(labels, 1)
        if len(values) != labels:
            raise MisconfigurationError(f"`weights` must hold a pair for each of the {labels} labels, got {values!r}.")
        return torch.stack([checked_weights(pair, 2) for pair in values])

    def _values(self) -> Any:
        return _from_file(Path(self.values)) if isinstance(self.values, str | Path) else self.values


def _from_file(path: Path) -> Sequence[Any]:
    remedy = "It must be a JSON list with one weight for each class, such as [1.0, 1.5, 4.0], or a pair for each label."
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"class weights cannot be read from {path}: {error}. {remedy}") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds {type(values).__name__} and not a list of class weights. {remedy}")
    return values
