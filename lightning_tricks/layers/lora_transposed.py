"""GPT-2's linear layer, whose weight is (inputs, outputs), with low-rank adapters. Imports transformers."""

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lightning_tricks.layers.lora_linear import adapted
from lightning_tricks.layers.low_rank import LowRankLayer
from lightning_tricks.layers.packed import PackedWeight

__all__ = ["LoRATransposed", "PackedTransposed"]


class LoRATransposed(LowRankLayer, Conv1D):  # type: ignore[misc]
    """`transformers.pytorch_utils.Conv1D` with low-rank adapters.

    Example:
        >>> import torch
        >>> from transformers.pytorch_utils import Conv1D
        >>> from lightning_tricks.layers import LowRank
        >>> from lightning_tricks.layers.lora_transposed import LoRATransposed
        >>> layer = LoRATransposed.convert(Conv1D(6, 4))  # 4 inputs, 6 outputs
        >>> layer.add_adapter("default", LowRank(rank=2, alpha=4))
        >>> layer(torch.ones(3, 4)).shape
        torch.Size([3, 6])
    """

    transposed = True

    def matrix_shape(self) -> tuple[int, int]:
        """The weight's (outputs, inputs)."""
        layer: Any = self
        return layer.nf, layer.nx

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight, transposed."""
        return weight.t()

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The matrix, transposed."""
        return matrix.t()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` of shape (..., inputs)."""
        if not self.active or self.merged is not None:
            return self.plain(x)
        layer: Any = self
        return adapted(layer, x)

    def plain(self, x: Tensor) -> Tensor:
        """The layer without adapters."""
        out: Tensor = Conv1D.forward(self, x)
        return out


class PackedTransposed(PackedWeight, LoRATransposed):
    """`Conv1D` in few bits, with low-rank adapters. What is packed has the shape (outputs, inputs)."""
