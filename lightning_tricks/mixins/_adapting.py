"""Giving a module an adapter, and freezing the rest of it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import leave_fast_path
from lightning_tricks.mixins import _selection as selection
from lightning_tricks.mixins import _small_base as small_base
from lightning_tricks.mixins._frozen_base import FrozenBase
from lightning_tricks.mixins._frozen_norms import keep_norms_still
from lightning_tricks.mixins._method import Method, layers_of
from lightning_tricks.mixins._switching import activate

__all__ = ["Adapter", "adapt", "leave_out", "path_of", "records"]


@dataclass(frozen=True)
class Adapter:
    """One adapter of one module: its method, what else is trained with it, and how the targets' weights are kept."""

    method: Method
    trainable: tuple[str, ...]
    base: small_base.Base | None = None


def adapt(owner: Any, module: nn.Module, adapter: Adapter, name: str) -> None:
    """Give `module`, a part of `owner`, an adapter. Doing the same a second time changes nothing."""
    prefix = path_of(owner, module)
    held = owner.__dict__.setdefault("_adapted", {}).setdefault(prefix, {})
    if name in held:
        _require_the_same(prefix, name, held[name], adapter)
        return
    try:
        _attach(owner, module, prefix, adapter, name)
    finally:
        if not held:
            del owner._adapted[prefix]


def _attach(owner: Any, module: nn.Module, prefix: str, adapter: Adapter, name: str) -> None:
    selection.require_identifier(name)
    selection.require_unmerged(owner, "adapt again")
    small_base.require_base(adapter.base, adapter.method)
    plan = adapter.method.plan(module, name)
    kept = selection.trainable(module, adapter.trainable)
    selection.require_values(module, plan)
    held = owner._adapted[prefix]
    _require_together(prefix, [*(other.method for other in held.values()), adapter.method])
    packed = small_base.pack(owner, module, plan, adapter.base)
    if not held:
        module.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_(True)
    small_base.install(packed)
    adapter.method.attach(module, name, plan)
    held[name] = adapter
    activate(module, {name: 1.0})
    selection.warn_of_frozen_heads(module)
    leave_fast_path(owner)
    leave_out(owner, prefix)


def leave_out(owner: Any, prefix: str) -> None:
    """Leave the frozen parameters of the module of this name out of `owner`'s checkpoints."""
    if "_frozen_base" not in owner.__dict__:
        owner._frozen_base = FrozenBase(owner)
    owner._frozen_base.add(prefix)
    keep_norms_still(owner.get_submodule(prefix))


def path_of(owner: Any, module: nn.Module) -> str:
    """The name of `module` in `owner`.

    Raises:
        MisconfigurationError: if it is not part of it.
    """
    for name, candidate in owner.named_modules():
        if candidate is module:
            return str(name)
    raise MisconfigurationError(
        f"the {type(module).__name__} to adapt is not a module of {type(owner).__name__}: assign it first, as in "
        "`self.encoder = encoder; self.adapt(self.encoder, ...)`."
    )


def records(owner: Any) -> dict[str, dict[str, Any]]:
    """What a checkpoint tells of the adapters: by module and name, the method and its options."""
    return {
        prefix: {name: _record(owner.get_submodule(prefix), name, adapter.method) for name, adapter in held.items()}
        for prefix, held in owner.__dict__.get("_adapted", {}).items()
    }


def _record(module: nn.Module, name: str, method: Method) -> dict[str, Any]:
    own = {"base": small_base.kept_as(module, name), "parts": _parts(module, name)} if method.packs_base else {}
    return {"method": type(method).__name__, **method.record(), **own}


def _parts(module: nn.Module, name: str) -> dict[str, str]:
    """Which outputs of fused projections an adapter changes: nothing in its tensors' shapes tells q from k."""
    layers = {path: layer.adapters[name].slices for path, layer in layers_of(module, name).items()}
    return {path: ",".join(f"{start}-{stop}" for start, stop in found) for path, found in layers.items() if found}


def _require_together(prefix: str, methods: list[Method]) -> None:
    for method in methods:
        if len(methods) > 1 and not method.switchable:
            raise MisconfigurationError(
                f"`{prefix}` cannot hold {type(method).__name__} and another adapter: {method.reason}"
            )


def _require_the_same(prefix: str, name: str, before: Adapter, now: Adapter) -> None:
    if before != now:
        raise MisconfigurationError(
            f"`{prefix}` has been adapted already under the name {name!r}, with {_told(before)}, and cannot be with "
            f"{_told(now)} as well: give the second another `name`."
        )


def _told(adapter: Adapter) -> str:
    base = "" if adapter.base is None else f", base={adapter.base!r}"
    return f"{adapter.method} and trainable={adapter.trainable}{base}"
