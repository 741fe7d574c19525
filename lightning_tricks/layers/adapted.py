"""What every layer with adapters has: names, weights, a switch, and merging into the base."""

from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lightning_tricks.errors import MisconfigurationError

__all__ = ["AdaptedLayer", "adapted_layers"]

DEFAULT = "default"  # the adapter whose parameters have no suffix


class AdaptedLayer(nn.Module):
    """A layer of some torch class, turned in place into a subclass that holds named adapters beside its weights.

    It is the same object under the same name, and its own parameters keep their keys. A subclass names its torch class
    beside this one, creates parameters in `_create`, and computes with the active adapters in `forward`.

    Attributes:
        adapters: for each adapter's name, its options.
        active: the names that have a say, each with its weight.
        merged: what the merged parameters were before, byte for byte; None while nothing is merged.
    """

    adapters: dict[str, Any]
    active: dict[str, float]
    merged: dict[str, Tensor] | None

    @classmethod
    def convert(cls, layer: nn.Module) -> Self:
        """Turn `layer` itself into one that holds adapters: the same object, wherever it is referred to."""
        if not isinstance(layer, cls):
            layer.__class__ = cls
        converted = cast(Self, layer)
        if "adapters" not in vars(converted):
            converted._begin()
        return converted

    def _begin(self) -> None:
        self.adapters, self.active, self.merged = {}, {}, None

    def add_adapter(self, name: str, options: Any) -> None:
        """Give the layer an adapter, and let it be the only active one.

        Raises:
            MisconfigurationError: if there is one of that name.
        """
        if name in self.adapters:
            raise MisconfigurationError(f"there is an adapter {name!r} already: give this one another name.")
        self.adapters[name] = options
        self._create(name, options)
        self.active = {name: 1.0}

    def _create(self, name: str, options: Any) -> None:
        """Register the adapter's parameters. Each kind of layer has its own."""
        raise NotImplementedError

    def own(self, kind: str, name: str) -> Any:
        """The parameter or buffer of one kind (`lora_A`) that belongs to an adapter."""
        return getattr(self, _key(kind, name))

    def set_own(self, kind: str, name: str, value: nn.Parameter) -> None:
        """Register it."""
        self.register_parameter(_key(kind, name), value)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The trained parameters of one adapter, by kind."""
        keys = {kind: _key(kind, name) for kind in self.kinds}
        return {kind: self._parameters[key] for kind, key in keys.items() if self._parameters.get(key) is not None}  # type: ignore[misc]

    kinds: tuple[str, ...] = ()

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Refuse weights that the layer's adapters cannot have. Changes nothing."""

    def activate(self, weights: Mapping[str, float]) -> None:
        """Let these adapters have a say, each with its weight; names that the layer does not hold are passed over.

        Only active adapters are trained: the parameters of the others require no gradient.
        """
        self.active = {name: float(weight) for name, weight in weights.items() if name in self.adapters}
        for name in self.adapters:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad_(name in self.active)

    def merged_values(self) -> dict[str, Tensor]:
        """The layer's own parameters with the active adapters merged into them. Each kind of layer has its own."""
        raise NotImplementedError

    def merge(self) -> None:
        """Put the active adapters into the layer's own weights, and keep those to restore them.

        Raises:
            MisconfigurationError: if that has been done.
        """
        if self.merged is not None:
            raise MisconfigurationError("the adapters are merged already: unmerge them first.")
        values = self.merged_values() if self.active else {}
        self.merged = {key: self._parameters[key].detach().clone() for key in values}  # type: ignore[union-attr]
        self._write(values)

    def unmerge(self) -> None:
        """Give the layer's own weights back the bytes that they had.

        Raises:
            MisconfigurationError: if nothing is merged.
        """
        if self.merged is None:
            raise MisconfigurationError("the adapters are not merged: there is nothing to unmerge.")
        self._write(self.merged)
        self.merged = None

    def _write(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, value in values.items():
                self._parameters[key].copy_(value)  # type: ignore[union-attr]


def adapted_layers(module: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The layers with adapters inside `module`, by name, each once."""
    for name, layer in module.named_modules():
        if isinstance(layer, AdaptedLayer):
            yield name, layer


def _key(kind: str, name: str) -> str:
    return kind if name == DEFAULT else f"{kind}_{name}"
