"""What `adapt` and its companions check about a module before they change it."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import path_matches
from lightning_tricks.layers import PackedWeight, adapted_layers, packed_layers
from lightning_tricks.layers.targets import HEADS

__all__ = [
    "require_ability",
    "require_identifier",
    "require_in_weights",
    "require_mergeable",
    "require_unmerged",
    "require_unpacked",
    "require_values",
    "several",
    "trainable",
    "warn_of_frozen_heads",
]


def several(names: Sequence[str]) -> Sequence[str]:
    """Names that may be passed as a list or tuple, not as one string.

    Raises:
        MisconfigurationError: if they are one string.
    """
    if isinstance(names, str):
        raise MisconfigurationError(f"`trainable` must be several names, got one: write trainable=({names!r},).")
    return names


def require_identifier(name: str) -> None:
    """A name of an adapter becomes part of its parameters' names.

    Raises:
        MisconfigurationError: if it cannot.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise MisconfigurationError(f"`name` must be letters, digits and underscores, got {name!r}: try 'french'.")


def require_values(module: nn.Module, plan: dict[str, Any]) -> None:
    """Adapting needs weights that are there, and whole.

    Raises:
        MisconfigurationError: if one is on the meta device, or sharded.
    """
    for path in plan:
        try:
            weight: Any = _kept(module.get_submodule(path))
        except AttributeError:  # the place is no module, but a name of the method's own
            continue
        if weight is not None and (weight.is_meta or hasattr(weight, "device_mesh")):
            state = "on the meta device, without values" if weight.is_meta else "sharded already"
            raise MisconfigurationError(
                f"the weight of `{path}` is {state}: call `adapt` in `__init__` or `configure_model`, once the "
                "pretrained weights are loaded and before the strategy shards them."
            )


def require_unmerged(owner: nn.Module, what: str) -> None:
    """Merged weights are not the base's.

    Args:
        owner: the module with the adapters.
        what: what is about to be done, as in "before you ...".

    Raises:
        MisconfigurationError: if adapters are merged.
    """
    if any(layer.merged is not None for _, layer in adapted_layers(owner)):
        raise MisconfigurationError(f"adapters are merged: call `unmerge_adapters()` before you {what}.")


def require_ability(owner: nn.Module, what: str, ability: str) -> None:
    """Not every method can be merged, or switched off.

    Args:
        owner: the module with the adapters.
        what: what is asked of them, as in "cannot ...".
        ability: the attribute of a method that says whether it can.

    Raises:
        MisconfigurationError: naming a method that cannot.
    """
    methods = [adapter.method for held in vars(owner).get("_adapted", {}).values() for adapter in held.values()]
    for method in methods:
        if not getattr(method, ability):
            raise MisconfigurationError(f"{type(method).__name__} cannot {what}: {method.reason}")


def require_in_weights(owner: nn.Module, module: nn.Module) -> None:
    """A file of plain weights has room for what is active only if weights can hold it.

    Raises:
        MisconfigurationError: naming the method of an active adapter of `module` that no weight can hold.
    """
    inside = {id(layer) for _, layer in adapted_layers(module)}
    for prefix, held in vars(owner).get("_adapted", {}).items():
        layers = [layer for _, layer in adapted_layers(owner.get_submodule(prefix)) if id(layer) in inside]
        for name in dict.fromkeys(name for layer in layers for name in layer.active):
            method = held[name].method if name in held else None
            if method is not None and not method.mergeable:
                raise MisconfigurationError(
                    f"{type(method).__name__} cannot be merged, and a file of plain weights would leave the adapter "
                    f"{name!r} out: {method.reason} For the base alone, export inside `adapters_disabled()`."
                )


def require_mergeable(owner: nn.Module) -> None:
    """Merging writes into weights: they must be whole, and nobody else's.

    Raises:
        MisconfigurationError: if one is sharded, or shared with another layer.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in owner.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for path, layer in adapted_layers(owner):
        weight = _kept(layer)
        if weight is None or not layer.active:
            continue
        if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
            raise MisconfigurationError(
                f"the weight of `{path}` is spread over ranks by the strategy: merge on one device, after the fit."
            )
        others = [name for name in users.get(id(weight), []) if name.rpartition(".")[0] != path]
        if others:
            raise MisconfigurationError(
                f"the weight of `{path}` is that of `{others[0]}` too, which the adapter does not change, and a merge "
                "would: leave the adapter unmerged, or untie the two before adapting."
            )


def require_unpacked(owner: nn.Module) -> None:
    """Few bits have no room for what a merge adds.

    Raises:
        MisconfigurationError: naming the layer, the reason, and what to do instead.
    """
    for path, layer in packed_layers(owner):
        raise MisconfigurationError(f"adapters cannot be merged into `{path}`: {layer.no_merge}")


def _kept(layer: nn.Module) -> Any:
    """What holds the weight of a layer, if it has one."""
    return layer.kept if isinstance(layer, PackedWeight) else getattr(layer, "weight", None)


def warn_of_frozen_heads(module: nn.Module) -> None:
    """Say so when a head, most likely made anew, is frozen along with the pretrained part, adapted or not."""
    held = [(layer, name) for _, layer in adapted_layers(module) for name in layer.adapters]
    adapters = {id(p) for layer, name in held for p in layer.adapter_parameters(name).values()}
    for name, inner in module.named_modules():
        parameters = [p for p in inner.parameters() if id(p) not in adapters]
        if name.rpartition(".")[2] in HEADS and parameters and not any(p.requires_grad for p in parameters):
            rank_zero_warn(
                f"`{name}` is inside the adapted module and frozen. If it is new, train it: trainable=({name!r},)."
            )


def trainable(module: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of `module` that patterns select, by their own name or that of a module around them.

    Raises:
        MisconfigurationError: if a pattern selects nothing.
    """
    kept = []
    for pattern in patterns:
        selected = [
            p for name, p in module.named_parameters() if any(path_matches(pattern, path) for path in _paths(name))
        ]
        if not selected:
            parts = ", ".join(name for name, _ in module.named_children())
            raise MisconfigurationError(
                f"trainable {pattern!r} selects no parameter of {type(module).__name__}, whose modules are: {parts}. "
                "What is outside the adapted module is trained anyway."
            )
        kept += selected
    return kept


def _paths(name: str) -> list[str]:
    """`a.b.c` and the modules around it: `a`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
