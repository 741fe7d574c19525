"""Convolutions and embeddings with low-rank adapters."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tricks.layers.low_rank import LowRank, LowRankLayer

__all__ = ["LoRAConv1d", "LoRAConv2d", "LoRAEmbedding"]


class _LoRAConvolution(LowRankLayer):
    """The update is a convolution to `rank` channels with the layer's own kernel, and a pointwise one from there."""

    kernel_size: tuple[int, ...]

    def matrix_shape(self) -> tuple[int, int]:
        """The output channels, and what one of them reads."""
        convolution = cast(nn.Conv2d, self)
        window = convolution.in_channels // convolution.groups
        for size in self.kernel_size:
            window *= size
        return convolution.out_channels, window

    def as_matrix(self, weight: Tensor) -> Tensor:
        """One row for each output channel."""
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Rows as kernels again."""
        return matrix.view(matrix.shape[0], -1, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` of shape (batch, channels, ...)."""
        convolution = cast(nn.Conv2d, self)
        out: Tensor = convolution._conv_forward(x, convolution.weight, convolution.bias)
        if self.merged is not None:
            return out
        for name, share in self.active.items():
            down, up = self.factors(name)
            dropped = F.dropout(x, self.dropout_of(name))
            narrow = convolution._conv_forward(dropped, self.as_weight(down).to(x.dtype), None)
            pointwise = up.t().to(x.dtype).reshape(*up.t().shape, *[1] * len(self.kernel_size))
            convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
            out = out + convolve(narrow, pointwise) * (share * self.adapters[name].scale)
        return out


class LoRAConv1d(_LoRAConvolution, nn.Conv1d):
    """`nn.Conv1d` with low-rank adapters.

    Example:
        >>> import torch
        >>> from lightning_tricks.layers import LoRAConv1d, LowRank
        >>> layer = LoRAConv1d.convert(torch.nn.Conv1d(3, 4, 5))
        >>> layer.add_adapter("default", LowRank(rank=2, alpha=4))
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([2, 15]), torch.Size([2, 4]))
    """


class LoRAConv2d(_LoRAConvolution, nn.Conv2d):
    """`nn.Conv2d` with low-rank adapters.

    Example:
        >>> import torch
        >>> from lightning_tricks.layers import LoRAConv2d, LowRank
        >>> layer = LoRAConv2d.convert(torch.nn.Conv2d(3, 4, 3))
        >>> layer.add_adapter("default", LowRank(rank=2, alpha=4))
        >>> layer(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 4, 6, 6])
    """


class LoRAEmbedding(LowRankLayer, nn.Embedding):
    """`nn.Embedding` with low-rank adapters: a row of `A`, one for each entry, times `B`.

    `lora_A` has the shape (entries, rank), so that rows are looked up, and starts at zero; `lora_B` the shape (rank,
    width), and starts at random.

    Example:
        >>> import torch
        >>> from lightning_tricks.layers import LoRAEmbedding, LowRank
        >>> layer = LoRAEmbedding.convert(torch.nn.Embedding(10, 4))
        >>> layer.add_adapter("default", LowRank(rank=2, alpha=4))
        >>> layer(torch.tensor([1, 2])).shape
        torch.Size([2, 4])
    """

    def matrix_shape(self) -> tuple[int, int]:
        """The width, and the number of entries: a row of the table is a column of the matrix."""
        return self.embedding_dim, self.num_embeddings

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The table, transposed."""
        return weight.t()

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The matrix, transposed."""
        return matrix.t()

    def _create(self, name: str, options: LowRank) -> None:
        super()._create(name, options)
        self.set_own("lora_A", name, nn.Parameter(self.own("lora_A", name).detach().t().contiguous()))
        self.reset_adapter(name)

    def reset_adapter(self, name: str = "default") -> None:
        """Start an adapter anew: `A` at zero and `B` at random, as the lookup needs only rows of `A`."""
        nn.init.zeros_(self.own("lora_A", name))
        nn.init.normal_(self.own("lora_B", name))

    def assemble(self, name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Of shapes (rank, entries) and (rank, width)."""
        return down.t(), up

    def forward(self, x: Tensor) -> Tensor:
        """Look up `x`, whole numbers of any shape."""
        out = nn.Embedding.forward(self, x)
        if self.merged is not None:
            return out
        for name, share in self.active.items():
            table, up = self.own("lora_A", name), self.own("lora_B", name)
            narrow = F.embedding(x, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
            update = (narrow @ up) * (share * self.adapters[name].scale)
            out = out + F.dropout(update, self.dropout_of(name)).to(out.dtype)
        return out
