"""Linear layers with low-rank adapters beside a frozen weight that is kept in few bits."""

from collections.abc import Iterator
from typing import Self, cast

import torch
from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import Packing, fingerprint, packed_linear
from lightning_tricks.layers.lora_linear import LoRALinear
from lightning_tricks.layers.low_rank import LowRankLayer

__all__ = ["PackedLinear", "PackedWeight", "packed_layers"]


class PackedWeight(LowRankLayer):
    """A linear layer without a parameter `weight`: it is kept in few bits, as a frozen parameter of bytes.

    Its name says how to read it: `weight_nf4`, `weight_int8`, `weight_bf16`. It is a parameter, so that engines place,
    share and copy it as they do others, and of bytes, which they do not cast. The layer computes in the precision of
    its inputs (in bf16 beside `weight_bf16`), or of autocast, and unpacks the weight for each pass.

    Attributes:
        packing: what unpacks it.
        weight_dtype: the precision that the weight had.
        original: the fingerprint of the weight before it was rounded.
    """

    packing: Packing
    weight_dtype: torch.dtype
    original: dict[str, str]
    transposed = False  # whatever the layer's class: what is packed is the matrix (outputs, inputs)

    @classmethod
    def of(cls, layer: nn.Module, packed: Tensor, packing: Packing) -> Self:
        """Turn `layer` itself into one of these, and drop its weight.

        Args:
            layer: a linear layer.
            packed: what `pack_weight` made of its weight as a matrix.
            packing: what unpacks it.
        """
        weight = cast(Tensor, layer.weight)
        original, dtype = fingerprint(whole(weight)), weight.dtype
        converted = cls.convert(layer)
        converted.packing, converted.original, converted.weight_dtype = packing, original, dtype
        del converted._parameters["weight"]
        converted.register_parameter(converted.key, nn.Parameter(packed, requires_grad=False))
        return converted

    @property
    def key(self) -> str:
        """The name of the parameter of bytes."""
        return f"weight_{self.packing.kind}"

    @property
    def kept(self) -> Tensor:
        """The parameter of bytes."""
        return cast(Tensor, getattr(self, self.key))

    @property
    def weight(self) -> Tensor:
        """What the bytes stand for, of the weight's shape and precision: a new tensor each time. Collective."""
        return self.as_weight(self.packing.unpack(whole(self.kept), self.weight_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` of shape (..., inputs); the output has its precision, or that of autocast."""
        if self.packing.kind != "bf16" or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, super().forward(x))
        return cast(Tensor, super().forward(x.bfloat16())).to(x.dtype)

    def plain(self, x: Tensor) -> Tensor:
        """The layer without adapters."""
        return packed_linear(x, self.kept, self.packing, cast("Tensor | None", self.bias))

    def reset_parameters(self) -> None:
        """Start the adapters anew. The weight stays: there is no other."""
        for name in self.adapters:
            self.reset_adapter(name)

    @property
    def no_merge(self) -> str:
        """Why adapters cannot be merged here, and what to do instead."""
        return (
            f"the weight is kept in {self.packing.kind}, and a merged one would be rounded to it again, which loses "
            "most of the update. Write the merged weights at the precision that they had by `export_merged(file)`, or "
            "`save_adapter` and merge it into the original file by `lightning-tricks adapters merge`."
        )

    def merge(self) -> None:
        """Refused.

        Raises:
            MisconfigurationError: with the reason, and what to do instead.
        """
        raise MisconfigurationError(f"adapters cannot be merged: {self.no_merge}")


class PackedLinear(PackedWeight, LoRALinear):  # type: ignore[override]
    """`nn.Linear` in few bits, with low-rank adapters.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import pack_weight
        >>> from lightning_tricks.layers import LowRank, PackedLinear
        >>> linear = torch.nn.Linear(64, 8)
        >>> layer = PackedLinear.of(linear, *pack_weight(linear.weight, "nf4"))
        >>> layer.add_adapter("default", LowRank(rank=2, alpha=4))
        >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        [('bias', (8,)), ('weight_nf4', (272,)), ('lora_A', (2, 64)), ('lora_B', (2, 8))]
        >>> layer(torch.ones(3, 64)).shape
        torch.Size([3, 8])
    """


def packed_layers(module: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """The layers inside `module` whose weights are kept in few bits, by name, each once."""
    for name, layer in module.named_modules():
        if isinstance(layer, PackedWeight):
            yield name, layer
