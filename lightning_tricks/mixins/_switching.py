"""Which of a module's adapters have a say."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import adapted_layers
from lightning_tricks.mixins._selection import require_ability, require_unmerged

__all__ = ["activate", "disabled", "is_fitting", "use"]


def use(owner: Any, weights: Mapping[str, float]) -> None:
    """Let the named adapters of `owner` have a say, each with its weight, and no others."""
    unknown = [name for name in weights if name not in owner.adapter_names]
    if unknown or not weights:
        known, asked = ", ".join(owner.adapter_names), unknown[0] if unknown else weights
        raise MisconfigurationError(f"there is no adapter {asked!r}: there are {known}.")
    require_unmerged(owner, "switch")
    if is_fitting(owner):
        raise MisconfigurationError(
            "a fit is running, whose optimizer holds the active adapters' parameters: switch between fits, or use "
            "`adapters_disabled()`."
        )
    for prefix, held in owner._adapted.items():
        activate(owner.get_submodule(prefix), {name: weight for name, weight in weights.items() if name in held})


def activate(module: nn.Module, weights: Mapping[str, float]) -> None:
    """As `use`, of one adapted module. A refusal changes nothing."""
    layers = [layer for _, layer in adapted_layers(module)]
    for layer in layers:
        layer.check_weights(weights)
    for layer in layers:
        layer.activate(weights)


@contextmanager
def disabled(owner: Any) -> Iterator[None]:
    """Let no adapter of `owner` have a say inside a `with` block."""
    require_unmerged(owner, "disable them")
    require_ability(owner, "be switched off", "switchable")
    before = [(layer, layer.active) for _, layer in adapted_layers(owner)]
    try:
        for layer, _ in before:
            layer.active = {}
        yield
    finally:
        for layer, active in before:
            layer.active = active


def is_fitting(owner: Any) -> bool:
    """Whether a fit of `owner` is running."""
    trainer = getattr(owner, "_trainer", None)
    return trainer is not None and (trainer.state.fn, trainer.state.status) == ("fit", "running")
