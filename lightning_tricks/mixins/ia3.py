"""Rescaling of keys, values and inner activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import ScaledLayer, ScaledLinear, Scaling, Target, find_targets
from lightning_tricks.layers.targets import is_linear
from lightning_tricks.mixins._method import Method, refuse_other_adapters, require_targets

__all__ = ["IA3"]


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """A trained factor for each output of some linear layers, and for each input of others. All start at one.

    In the paper the outputs are those of the key and value projections, and the inputs those of the second layer of
    each feed-forward part.

    Args:
        targets: the layers whose outputs are rescaled, as in `LoRA`; may be empty if the other is not.
        feedforward: the layers whose inputs are rescaled; likewise.

    Raises:
        MisconfigurationError: if a name is missing.

    Example:
        >>> from lightning_tricks.mixins import IA3
        >>> IA3(targets=("key", "value"), feedforward=("*[0-9].output.dense",)).targets
        ('key', 'value')

    References:
        Liu et al.: Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning
        (NeurIPS 2022).
    """

    targets: Sequence[str] = ("key", "value")
    feedforward: Sequence[str] = ()

    recorded: ClassVar[tuple[str, ...]] = ("targets", "feedforward")

    def __post_init__(self) -> None:
        both = {"targets": self.targets, "feedforward": self.feedforward}
        if not any(both.values()):
            raise MisconfigurationError("`targets` and `feedforward` are both empty: name at least one layer.")
        for option, names in both.items():
            object.__setattr__(self, option, require_targets(names) if names else ())

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The layers, and which side of each is rescaled.

        Raises:
            MisconfigurationError: if a target does not fit, or is named for both sides.
        """
        outputs = find_targets(module, self.targets)
        inputs = find_targets(module, self.feedforward)
        for path in inputs:
            if path in outputs:
                raise MisconfigurationError(f"`{path}` is in `targets` and in `feedforward`: choose one for it.")
        found = {**outputs, **inputs}
        refuse_other_adapters(found, name, ScaledLayer)
        for path, target in found.items():
            _require_linear(path, target)
        return {path: (target, Scaling(inputs=path in inputs)) for path, target in found.items()}

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Turn the layers into ones that are rescaled, and give each its factors."""
        for target, options in plan.values():
            _class(target.layer).convert(target.layer).add_adapter(name, options)

    def options_by_layer(self) -> dict[str, Any]:
        """Whether the inputs of each are rescaled."""
        return {path: path in self.feedforward for path in (*self.targets, *self.feedforward)}

    def shapes(self, plan: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Of the factors: one for each output or input."""
        return {
            f"{path}.ia3_l": (target.sizes()[1 if options.inputs else 0],) for path, (target, options) in plan.items()
        }


def _class(layer: nn.Module) -> type[ScaledLayer]:
    if isinstance(layer, nn.Linear):
        return ScaledLinear
    from lightning_tricks.layers.scaled_transposed import ScaledTransposed

    return ScaledTransposed


def _require_linear(path: str, target: Target) -> None:
    if not is_linear(target.layer) or target.slices:
        raise MisconfigurationError(
            f"IA3 rescales whole linear layers, and `{path}` is a {type(target.layer).__name__} or a part of one: name "
            "others."
        )
