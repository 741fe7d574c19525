"""Whether an adapter folder can go where it is to go: looked at before anything is changed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.layers import LowRankLayer, ScaledLayer
from lightning_tricks.mixins._adapter_folder import AdapterFolder
from lightning_tricks.mixins._adapting import Adapter
from lightning_tricks.mixins._method import Method, layers_of
from lightning_tricks.mixins._peft_fill import own_tensors
from lightning_tricks.mixins._switching import is_fitting

__all__ = ["require_agreement", "require_own_modules", "require_whole_places"]

_ELSEWHERE = "load it under another name"


def require_whole_places(owner: Any, module: nn.Module, name: str) -> None:
    """Loading writes whole tensors: before a strategy shards the module, or makes master copies of it.

    Raises:
        MisconfigurationError: naming a parameter that is spread over ranks, or that a running fit keeps a copy of.
    """
    places = own_tensors(module, name)
    for key, value in {**dict(module.named_parameters()), **places}.items():
        spread = hasattr(value, "device_mesh") or (key in places and hasattr(value, "ds_id"))
        copied = key in places and getattr(value, "_hp_mapping", None) is not None and is_fitting(owner)
        if spread or copied:
            state = "spread over ranks by the strategy" if spread else "kept a second time, in fp32, by the strategy"
            raise MisconfigurationError(
                f"`{key}` is {state}: call `load_adapter` in `__init__` or `configure_model`, before the fit."
            )


def require_agreement(folder: AdapterFolder, there: Method, here: Method, module: nn.Module, name: str) -> None:
    """Whether values of one adapter mean the same in another one, that is here: their shapes do not tell the scale.

    Args:
        folder: where the values come from.
        there: its method.
        here: the method of the adapter here.
        module: the adapted module.
        name: of the adapter here.

    Raises:
        CheckpointError: naming the layer, and what it is there and here.
    """
    if type(here) is not type(there):
        raise CheckpointError(
            f"{folder.path} holds a {type(there).__name__} adapter, and {name!r} is a {type(here).__name__} here: "
            f"{_ELSEWHERE}."
        )
    planned = there.options_by_layer()
    for path, layer in layers_of(module, name).items():
        if path not in planned:
            continue  # the tensor that is missing is named later
        if isinstance(layer, LowRankLayer):
            _require_the_same_scale(folder, path, planned[path], layer.adapters[name], name)
        elif isinstance(layer, ScaledLayer) and layer.adapters[name].inputs != planned[path]:
            sides = {True: "inputs", False: "outputs"}
            raise CheckpointError(
                f"{folder.path} rescales the {sides[planned[path]]} of `{path}`, and {name!r} its "
                f"{sides[not planned[path]]} here: {_ELSEWHERE}."
            )


def _require_the_same_scale(folder: AdapterFolder, path: str, there: Any, here: Any, name: str) -> None:
    if here.init == "pissa" or here.slices:
        what = "subtracts a start of its own" if here.init == "pissa" else "changes parts of the outputs"
        raise CheckpointError(
            f"{folder.path} holds a plain LoRA of `{path}`, as peft does, and {name!r} {what} there: {_ELSEWHERE}."
        )
    if here.rank == there.rank and abs(here.scale - there.scale) > 1e-9 * there.scale:
        raise CheckpointError(
            f"{folder.path} scales the update of `{path}` by {there.scale:g} ({_told(there)}), and {name!r} by "
            f"{here.scale:g} here ({_told(here)}): {_ELSEWHERE}, or adapt with the options that it was trained with."
        )


def _told(options: Any) -> str:
    return f"rank {options.rank}, alpha {options.alpha:g}{', rslora' if options.rslora else ''}"


def require_own_modules(
    folder: AdapterFolder, module: nn.Module, others: Mapping[str, Tensor], held: Mapping[str, Adapter], name: str
) -> None:
    """What goes along with an adapter (`modules_to_save`) is the base's own: all adapters of it share it.

    Raises:
        CheckpointError: naming a tensor that another adapter needs as it is, or that is frozen beside this one.
    """
    entries: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    sharers = [other for other in held if other != name]
    for key, value in others.items():
        entry = entries[key]
        if torch.equal(whole(entry).detach().cpu().float(), value.float()):
            continue
        if sharers:
            raise CheckpointError(
                f"{folder.path} holds `{key}` besides its adapter, and here it is the one of {sharers[0]!r} too, which "
                "would change: load the folder in a module of its own."
            )
        if name in held and isinstance(entry, nn.Parameter) and not entry.requires_grad:
            raise CheckpointError(
                f"{folder.path} holds `{key}` besides its adapter, and here it is frozen beside {name!r}: name it in "
                "`trainable` when you adapt."
            )
