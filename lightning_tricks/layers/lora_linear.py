"""A linear layer with a low-rank adapter beside its frozen weight."""

import math
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tricks.functional import low_rank_update

__all__ = ["LoRALinear"]


class LoRALinear(nn.Linear):
    """`nn.Linear` whose output is `x @ W.T + b + alpha / rank * (dropout(x) @ A.T) @ B`.

    A new adapter adds exactly nothing: `B` starts at zero. It is kept in fp32 whatever the precision of `W`, and cast
    to that of the inputs. The names of the base's entries in a state dict (`weight`, `bias`) stay as they are.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether there is a bias.
        rank: rank of the update, 1 or more; 4 to 64 in practice.
        alpha: the update is scaled by `alpha / rank`; above 0.
        dropout: probability of dropping an input of the adapter, in [0, 1).

    Attributes:
        lora_A: the first factor, of shape (rank, in_features).
        lora_B: the second, transposed with respect to the paper, of shape (rank, out_features).

    Example:
        >>> import torch
        >>> from lightning_tricks.layers import LoRALinear
        >>> layer = LoRALinear.extend(torch.nn.Linear(6, 4), rank=2, alpha=4)
        >>> layer(torch.ones(3, 6)).shape
        torch.Size([3, 4])
        >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        [('weight', (4, 6)), ('bias', (4,)), ('lora_A', (2, 6)), ('lora_B', (2, 4))]

    References:
        Hu et al.: LoRA: Low-rank adaptation of large language models (ICLR 2022).
    """

    lora_A: nn.Parameter  # noqa: N815  (the names that adapter files use)
    lora_B: nn.Parameter  # noqa: N815
    lora_rank: int
    lora_alpha: float
    lora_dropout: float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._add_adapter(rank, alpha, dropout)

    @classmethod
    def extend(cls, layer: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> Self:
        """Turn `layer` itself into a `LoRALinear`: the same object, with the same weights, wherever it is referred to.

        Args:
            layer: a plain `nn.Linear`.
            rank: as in the class.
            alpha: as in the class.
            dropout: as in the class.
        """
        layer.__class__ = cls
        extended = cast(Self, layer)
        extended._add_adapter(rank, alpha, dropout)
        return extended

    def _add_adapter(self, rank: int, alpha: float, dropout: float) -> None:
        self.lora_rank, self.lora_alpha, self.lora_dropout = rank, float(alpha), dropout
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(rank, self.out_features, device=device, dtype=torch.float32))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Start the adapter anew: `A` as a linear layer's weight, `B` at zero, so that it adds nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def reset_parameters(self) -> None:
        """Start the weight and, once there is one, the adapter anew."""
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_adapter()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: inputs of shape (..., in_features).

        Returns:
            Outputs of shape (..., out_features).
        """
        base = super().forward(x)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        return base + low_rank_update(dropped, self.lora_A, self.lora_B, self.lora_alpha / self.lora_rank)

    def extra_repr(self) -> str:
        """The layer's sizes and the adapter's."""
        return (
            f"{super().extra_repr()}, rank={self.lora_rank}, alpha={self.lora_alpha:g}, dropout={self.lora_dropout:g}"
        )
