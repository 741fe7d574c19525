"""Weight-decomposed low-rank adaptation."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_tricks.mixins.lora import LoRA

__all__ = ["DoRA"]


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA of the direction of each row of a linear layer's weight, and a trained length of the row.

    The options are those of `LoRA`. Each layer gets `out` parameters more.

    Example:
        >>> from lightning_tricks.mixins import DoRA
        >>> DoRA(rank=4, targets=("query",)).rank
        4

    References:
        Liu et al.: DoRA: Weight-decomposed low-rank adaptation (ICML 2024).
    """

    decomposed: ClassVar[bool] = True
