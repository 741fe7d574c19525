"""Layers whose inputs or outputs an adapter rescales (IA3)."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_tricks.layers.adapted import AdaptedLayer

__all__ = ["Scaling", "ScaledLayer", "ScaledLinear"]


@dataclass(frozen=True)
class Scaling:
    """The options of one adapter that rescales.

    Args:
        inputs: whether it rescales the layer's inputs rather than its outputs.
    """

    inputs: bool = False


class ScaledLayer(AdaptedLayer):
    """A linear layer with vectors that its outputs, or its inputs, are multiplied by; they start at one.

    Of several active adapters the changes are added: `1 + sum of weight * (vector - 1)`.
    """

    kinds = ("ia3_l",)
    adapters: dict[str, Scaling]
    output_axis = 0  # of the weight

    def sizes(self) -> tuple[int, int]:
        """The number of outputs and of inputs. Each kind of layer has its own."""
        raise NotImplementedError

    def _create(self, name: str, options: Scaling) -> None:
        weight = cast(Tensor, self.weight)
        size = self.sizes()[1 if options.inputs else 0]
        self.set_own("ia3_l", name, nn.Parameter(torch.ones(size, device=weight.device)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` of shape (..., inputs)."""
        if self.merged is None and (factor := self._factor(inputs=True)) is not None:
            x = x * factor.to(x.dtype)
        out: Tensor = super().forward(x)
        if self.merged is None and (factor := self._factor(inputs=False)) is not None:
            out = out * factor.to(out.dtype)
        return out

    def _factor(self, *, inputs: bool) -> Tensor | None:
        total: Tensor | None = None
        for name, weight in self.active.items():
            if self.adapters[name].inputs == inputs:
                change = weight * (self.own("ia3_l", name) - 1)
                total = change + (1 if total is None else total)
        return total

    def merged_values(self) -> dict[str, Tensor]:
        """The weight, and the bias, as they would be with the vectors in them."""
        layer: Any = self
        weight = layer.weight.detach()
        exact = torch.promote_types(weight.dtype, torch.float32)
        values = {"weight": weight.to(exact)}
        if layer.bias is not None:
            values["bias"] = layer.bias.detach().to(exact)
        with torch.no_grad():
            for key, factor in (("inputs", self._factor(inputs=True)), ("outputs", self._factor(inputs=False))):
                if factor is None:
                    continue
                along_rows = (key == "outputs") == (self.output_axis == 0)
                values["weight"] = values["weight"] * (factor[:, None] if along_rows else factor)
                if key == "outputs" and "bias" in values:
                    values["bias"] = values["bias"] * factor
        return {key: value.to(weight.dtype) for key, value in values.items()}


class ScaledLinear(ScaledLayer, nn.Linear):
    """`nn.Linear` whose inputs or outputs adapters rescale.

    Example:
        >>> import torch
        >>> from lightning_tricks.layers import ScaledLinear, Scaling
        >>> layer = ScaledLinear.convert(torch.nn.Linear(3, 4))
        >>> layer.add_adapter("default", Scaling())
        >>> layer.ia3_l
        Parameter containing:
        tensor([1., 1., 1., 1.], requires_grad=True)
    """

    def sizes(self) -> tuple[int, int]:
        """The number of outputs and of inputs."""
        return self.out_features, self.in_features
