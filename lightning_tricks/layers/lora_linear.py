"""A linear layer with low-rank adapters beside its frozen weight."""

from typing import Self

from torch import Tensor, nn

from lightning_tricks.functional import dora_linear, low_rank_linear, low_rank_update
from lightning_tricks.layers.low_rank import LowRank, LowRankLayer

__all__ = ["LoRALinear"]


class LoRALinear(LowRankLayer, nn.Linear):
    """`nn.Linear` whose output is `x @ W.T + b + alpha / rank * (dropout(x) @ A.T) @ B`.

    A new adapter adds exactly nothing. It is kept in fp32 whatever the precision of `W`, and cast to that of the
    inputs. The names of the base's entries in a state dict (`weight`, `bias`) stay as they are.

    Args:
        in_features: size of each input.
        out_features: size of each output.
        bias: whether there is a bias.
        rank: rank of the update, 1 or more; 4 to 64 in practice.
        alpha: the update is scaled by `alpha / rank`; above 0.
        dropout: probability of dropping an input of the adapter, in [0, 1), rounded to a multiple of 1/256.

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
    transposed = False  # whether the weight is (in_features, out_features)

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
        nn.Linear.__init__(self, in_features, out_features, bias)
        self._begin()
        self.add_adapter("default", LowRank(rank, float(alpha), dropout))

    @classmethod
    def extend(cls, layer: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> Self:
        """Turn `layer` itself into a `LoRALinear`: the same object, with the same weights, wherever it is referred to.

        Args:
            layer: a plain `nn.Linear`.
            rank: as in the class.
            alpha: as in the class.
            dropout: as in the class.
        """
        extended = cls.convert(layer)
        extended.add_adapter("default", LowRank(rank, float(alpha), dropout))
        return extended

    @property
    def lora_rank(self) -> int:
        """The rank of the first adapter."""
        return next(iter(self.adapters.values())).rank

    def matrix_shape(self) -> tuple[int, int]:
        """The weight's (outputs, inputs)."""
        return self.out_features, self.in_features

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight is the matrix."""
        return weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The matrix is the weight."""
        return matrix

    def reset_parameters(self) -> None:
        """Start the weight and the adapters, once there are some, anew."""
        super().reset_parameters()
        for name in vars(self).get("adapters", ()):
            self.reset_adapter(name)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: inputs of shape (..., in_features).

        Returns:
            Outputs of shape (..., out_features).
        """
        if not self.active or self.merged is not None:
            return self.plain(x)
        return adapted(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The layer without adapters."""
        return nn.Linear.forward(self, x)


def adapted(layer: LoRALinear, x: Tensor) -> Tensor:
    """The output with the active adapters: the first, and often only, one comes with the base as one operation."""
    (name, share), *others = layer.active.items()
    (down, up), options = layer.factors(name), layer.adapters[name]
    scale, dropout = share * options.scale, layer.dropout_of(name)
    transposed, packing = layer.transposed, layer.packing
    if options.decomposed:
        lengths = layer.own("lora_magnitude", name)
        return dora_linear(
            x, layer.kept, layer.bias, down, up, lengths, scale, dropout=dropout, transposed=transposed, packing=packing
        )
    out = low_rank_linear(
        x, layer.kept, layer.bias, down, up, scale, dropout=dropout, transposed=transposed, packing=packing
    )
    for other, weight in others:
        dropped = nn.functional.dropout(x, layer.dropout_of(other))
        out = out + low_rank_update(dropped, *layer.factors(other), weight * layer.adapters[other].scale)
    return out
