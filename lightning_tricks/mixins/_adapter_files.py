"""Saving and loading one adapter of a module in peft's format, and the merged model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.engines import ranks, whole
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import fingerprint, same_fingerprint
from lightning_tricks.layers import AdaptedLayer, PackedWeight, adapted_layers, packed_layers
from lightning_tricks.mixins._adapter_folder import AdapterFolder, read_folder, write_folder
from lightning_tricks.mixins._adapting import path_of
from lightning_tricks.mixins._peft_export import exported
from lightning_tricks.mixins._peft_fill import fill
from lightning_tricks.mixins._peft_method import method_of
from lightning_tricks.mixins._small_base import Base
from lightning_tricks.storage import write_weights

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
    if ranks()[0] == 0:
        write_folder(Path(folder), AdapterFolder(config, tensors, base))


def load_adapter(owner: Any, folder: Path, name: str, module: nn.Module, base: Base | None) -> None:
    """Read an adapter into `module`, which gets it if it has none of this name."""
    content = read_folder(folder)
    method, trainable = method_of(content)
    _require_the_base(content, module)
    held = owner.__dict__.get("_adapted", {}).get(path_of(owner, module), {})
    if name not in held:
        owner.adapt(module, method, trainable=trainable, name=name, base=base)
    elif type(held[name].method) is not type(method):
        raise CheckpointError(
            f"{folder} holds a {type(method).__name__} adapter, and {name!r} is a {type(held[name].method).__name__} "
            "here: load it under another name."
        )
    fill(module, name, content)


def export_merged(path: Path, module: nn.Module) -> None:
    """Write the module's own entries as they are with the active adapters in them, one tensor at a time."""
    layers = dict(adapted_layers(module))
    own = _own_keys(layers)
    entries = {key: tensor for key, tensor in _entries(module) if key not in own}
    if Path(path).suffix != ".safetensors":
        raise MisconfigurationError(f"`path` must end in .safetensors, got {str(path)!r}.")
    layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in entries.items()}
    pairs = ((key, _merged_entry(layers, key, tensor)) for key, tensor in entries.items())
    write_weights(Path(path), layout, pairs, {"format": "pt"})


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
    for key, expected in content.base.items():
        if key not in present and key not in packed:
            raise CheckpointError(f"{content.path} was trained beside a `{key}`, and this module has none.")
        found = packed[key] if key in packed else fingerprint(whole(present[key]))
        if not same_fingerprint(expected, found):
            raise CheckpointError(
                f"`{key}` is not the tensor that the adapter in {content.path} was trained on (there {expected}, here "
                f"{found}): load it onto the base that it was trained on."
            )
