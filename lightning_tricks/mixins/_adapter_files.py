"""Saving and loading one adapter of a module in peft's format, and the merged model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.engines import stream_on_rank_zero, whole, write_on_rank_zero
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import fingerprint, same_fingerprint
from lightning_tricks.layers import AdaptedLayer, PackedWeight, adapted_layers, packed_layers
from lightning_tricks.mixins._adapter_agreement import require_agreement, require_own_modules, require_whole_places
from lightning_tricks.mixins._adapter_folder import AdapterFolder, read_folder, write_folder
from lightning_tricks.mixins._adapting import path_of
from lightning_tricks.mixins._method import layers_of
from lightning_tricks.mixins._peft_export import exported
from lightning_tricks.mixins._peft_fill import fill, given_by, own_tensors, require_fit
from lightning_tricks.mixins._peft_method import method_of, require_copies
from lightning_tricks.mixins._small_base import Base
from lightning_tricks.mixins._switching import activate, is_fitting

__all__ = ["export_merged", "load_adapter", "save_adapter"]


def save_adapter(owner: Any, folder: Path, name: str) -> None:
    """Write the adapter of this name. Collective; rank 0 writes."""
    prefix = _prefix_of(owner, name)
    module = owner.get_submodule(prefix)
    config, tensors = exported(owner._adapted[prefix][name].method, module, name)
    start = f"{prefix}." if prefix else ""
    base = {
        key.removeprefix(start): value
        for key, value in owner._frozen_base.fingerprints(owner).items()
        if key.startswith(start)
    }
    users: dict[int, list[str]] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(key)
    tied = [keys for keys in users.values() if len(keys) > 1]
    flipped = [path for path, layer in layers_of(module, name).items() if _is_transposed(layer)]
    content = AdapterFolder(config, tensors, base, tied=tied, transposed=flipped)
    write_on_rank_zero(Path(folder), lambda: write_folder(Path(folder), content))


def _is_transposed(layer: AdaptedLayer) -> bool:
    return bool(getattr(layer, "transposed", False)) or getattr(layer, "output_axis", 0) == 1


def load_adapter(owner: Any, folder: Path, name: str, module: nn.Module, base: Base | None) -> None:
    """Read an adapter into `module`, which gets it if it has none of this name."""
    content = read_folder(folder)
    method, trained = method_of(content)
    require_whole_places(owner, module, name, trained)
    _require_the_base(content, module)
    held = owner.__dict__.get("_adapted", {}).get(path_of(owner, module), {})
    given = given_by(content)
    if name in held:
        require_agreement(content, method, held[name].method, module, name)
        wanted = {key: tuple(value.shape) for key, value in own_tensors(module, name).items()}
        _require_switchable(owner, module, name)
    else:
        wanted = method.shapes(method.plan(module, name))
    require_fit(content, module, wanted, given)
    require_own_modules(content, module, {key: given[key] for key in trained}, held, name)
    if name in held:
        activate(module, {name: 1.0})
    else:
        parameters = dict(module.named_parameters())
        owner.adapt(module, method, trainable=[key for key in trained if key in parameters], name=name, base=base)
    fill(module, name, given)


def _require_switchable(owner: Any, module: nn.Module, name: str) -> None:
    if is_fitting(owner) and any(layer.active != {name: 1.0} for layer in layers_of(module, name).values()):
        raise MisconfigurationError(
            f"a fit is running, whose optimizer holds the active adapters' parameters, and {name!r} is at rest: load "
            "it before the fit."
        )


def export_merged(path: Path, module: nn.Module) -> None:
    """Write the module's own entries as they are with the active adapters in them, one tensor at a time. Collective."""
    layers = dict(adapted_layers(module))
    own = _own_keys(layers)
    entries = {key: tensor for key, tensor in _entries(module) if key not in own}
    if Path(path).suffix != ".safetensors":
        raise MisconfigurationError(f"`path` must end in .safetensors, got {str(path)!r}.")
    layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in entries.items()}
    pairs = ((key, _merged_entry(layers, key, tensor).to(tensor.dtype)) for key, tensor in entries.items())
    stream_on_rank_zero(Path(path), layout, pairs, {"format": "pt"})


def _entries(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds. The module's own would leave frozen parameters out, if it is the adapting one.

    In the place of a weight in few bits stands its layout: it is unpacked when its turn comes.
    """
    packed = {f"{path}.{layer.key}".lstrip("."): (path, layer) for path, layer in packed_layers(module)}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in packed:
            path, layer = packed[name]
            shape = layer.as_weight(torch.empty(layer.packing.shape, device="meta")).shape
            yield f"{path}.weight".lstrip("."), torch.empty(shape, dtype=layer.weight_dtype, device="meta")
        else:
            yield name, parameter
    for path, inner in module.named_modules():
        for key, buffer in inner._buffers.items():
            if buffer is not None and key not in inner._non_persistent_buffers_set:
                yield f"{path}.{key}" if path else key, buffer


def _own_keys(layers: dict[str, AdaptedLayer]) -> set[str]:
    """The keys of adapters: everything in an adapted layer that its torch class does not have."""
    found = set()
    for path, layer in layers.items():
        for key in (*layer._parameters, *layer._buffers):
            if any(key.startswith(kind) for kind in layer.kinds):
                found.add(f"{path}.{key}" if path else key)
    return found


def _merged_entry(layers: dict[str, AdaptedLayer], key: str, tensor: Tensor) -> Tensor:
    path, _, last = key.rpartition(".")
    layer = layers.get(path)
    if layer is None or not layer.active or layer.merged is not None:
        return layer.weight if isinstance(layer, PackedWeight) and last == "weight" else whole(tensor)
    return layer.merged_values().get(last, tensor.detach())


def _prefix_of(owner: Any, name: str) -> str:
    found = [prefix for prefix, held in owner.__dict__.get("_adapted", {}).items() if name in held]
    if not found:
        raise MisconfigurationError(f"there is no adapter {name!r}: there are {', '.join(owner.adapter_names)}.")
    if len(found) > 1:
        raise MisconfigurationError(
            f"{len(found)} modules have an adapter {name!r} ({', '.join(found)}), and a folder holds that of one: give "
            "them different names."
        )
    return str(found[0])


def _require_the_base(content: AdapterFolder, module: nn.Module) -> None:
    present = dict(module.named_parameters(remove_duplicate=False))
    packed = {f"{path}.weight".lstrip("."): layer.original for path, layer in packed_layers(module)}

    def find(key: str) -> dict[str, str] | None:
        return packed[key] if key in packed else fingerprint(whole(present[key])) if key in present else None

    require_copies(content, find)
    for key, expected in content.base.items():
        found = find(key)
        if found is None:
            raise CheckpointError(f"{content.path} was trained beside a `{key}`, and this module has none.")
        if not same_fingerprint(expected, found):
            raise CheckpointError(
                f"`{key}` is not the tensor that the adapter in {content.path} was trained on (there {expected}, here "
                f"{found}): load it onto the base that it was trained on."
            )
