"""What a method of adaptation is: a policy that finds its places, fills them, and tells files about itself."""

from dataclasses import asdict
from typing import Any, ClassVar

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import AdaptedLayer, adapted_layers
from lightning_tricks.layers.targets import Target

__all__ = ["Method", "require_targets"]


class Method:
    """Base of the policies that `AdapterMixin.adapt` takes: frozen dataclasses of options.

    A method finds its targets, and says what is wrong with them, before anything is changed (`plan`); gives them an
    adapter (`attach`); and names what a checkpoint of it must agree with (`record`). The rest (switching, merging,
    freezing) is the adapted layers' own: `layers.AdaptedLayer`.
    """

    mergeable: ClassVar[bool] = True  # into the base's own weights
    switchable: ClassVar[bool] = True  # off, so that the base alone computes
    in_base: ClassVar[bool] = False  # whether what it trains is the base's own, so that there is nothing to merge
    packs_base: ClassVar[bool] = False  # whether it computes with its targets' weights itself, in however few bits
    reason: ClassVar[str] = ""  # why not, and what to do instead

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """Where it goes: by the name inside `module`. Changes nothing.

        Raises:
            MisconfigurationError: if it cannot go there.
        """
        raise NotImplementedError

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Put an adapter of this name in each place."""
        raise NotImplementedError

    def shapes(self, plan: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes that a new adapter's tensors would have, by place and kind; of the methods that peft has."""
        raise NotImplementedError

    def options_by_layer(self) -> dict[str, Any]:
        """What decides the meaning of each layer's values, where a folder's tensors named the layers one by one."""
        return {}

    def record(self) -> dict[str, Any]:
        """Plain values with which trained adapters do not fit other ones."""
        options = asdict(self)  # type: ignore[call-overload]
        return {key: options[key] for key in self.recorded if options[key] is not None}

    recorded: ClassVar[tuple[str, ...]] = ()


def require_targets(targets: Any) -> tuple[str, ...]:
    """Several names of layers, as a tuple.

    Raises:
        MisconfigurationError: if there is none, one is empty, or it is one string.
    """
    if isinstance(targets, str) and targets in ("all-linear", "attention"):
        return (targets,)
    if isinstance(targets, str):
        raise MisconfigurationError(f"`targets` must be several names, got one: write targets=({targets!r},).")
    several = tuple(targets)
    if not several or not all(isinstance(target, str) and target for target in several):
        raise MisconfigurationError(
            f'`targets` must name at least one layer, got {several!r}: try ("query", "value"), or ("*",).'
        )
    return several


def refuse_other_adapters(targets: dict[str, Target], name: str, wanted: type[AdaptedLayer]) -> None:
    """Refuse layers with adapters of another kind, or with one of this name.

    Raises:
        MisconfigurationError: naming the layer.
    """
    for path, target in targets.items():
        layer = target.layer
        if isinstance(layer, AdaptedLayer) and not isinstance(layer, wanted):
            raise MisconfigurationError(
                f"`{path}` is a {type(layer).__name__} already, and one layer holds adapters of one kind: choose other "
                "targets, or another method."
            )
        if isinstance(layer, AdaptedLayer) and name in layer.adapters:
            raise MisconfigurationError(f"`{path}` has an adapter {name!r} already: give this one another name.")


def layers_of(module: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    """The layers inside `module` that hold an adapter of this name."""
    return {path: layer for path, layer in adapted_layers(module) if name in layer.adapters}
