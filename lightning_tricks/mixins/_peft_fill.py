"""The tensors of peft's adapters put into ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.errors import CheckpointError
from lightning_tricks.mixins._adapter_folder import AdapterFolder
from lightning_tricks.mixins._method import layers_of
from lightning_tricks.mixins._peft_method import beside, parts

__all__ = ["fill", "given_by", "own_tensors", "require_fit"]


def given_by(folder: AdapterFolder) -> dict[str, Tensor]:
    """The folder's tensors under our names and in our layout, those of the base's own modules as they are."""
    own = {_place(folder, path, kind): _ours(kind, t) for path, kind, t in parts(folder)}
    return own | beside(folder)


def require_fit(
    folder: AdapterFolder, module: nn.Module, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]
) -> None:
    """Whether the tensors fit the places of an adapter, which need not be there yet. Changes nothing.

    Args:
        folder: where they come from.
        module: the base.
        wanted: the shapes of the adapter's tensors.
        given: the tensors.

    Raises:
        CheckpointError: if one is missing, too many, or has another shape.
    """
    entries = _entries(module)
    shapes = {**wanted, **{key: tuple(entries[key].shape) for key in beside(folder) if key in entries}}
    _require_the_same_names(folder, shapes, given)
    for key, value in given.items():
        if shapes[key] != tuple(value.shape):
            raise CheckpointError(
                f"{folder.path}: `{key}` has the shape {list(value.shape)}, and this module's has {list(shapes[key])}."
            )


@torch.no_grad()
def fill(module: nn.Module, name: str, given: Mapping[str, Tensor]) -> None:
    """Put tensors that fit into the adapter of this name, and into the base's own modules."""
    places: dict[str, Tensor] = own_tensors(module, name)
    for key, entry in _entries(module).items():
        places.setdefault(key, entry)
    for key, value in given.items():
        places[key].copy_(value)


def own_tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter, by place and kind."""
    return {
        f"{path}.{kind}": value
        for path, layer in layers_of(module, name).items()
        for kind, value in layer.adapter_parameters(name).items()
    }


def _entries(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _place(folder: AdapterFolder, path: str, kind: str) -> str:
    if kind == "prompt_embeddings":
        return "prompts.prompt" if folder.config["peft_type"] == "PROMPT_TUNING" else "prompts.prefix"
    return f"{path}.{_OURS[kind]}"


def _require_the_same_names(folder: AdapterFolder, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for key in wanted:
        if key not in given:
            raise CheckpointError(f"{folder.path} lacks the tensor for `{key}`.")
    for key in given:
        if key not in wanted:
            raise CheckpointError(f"{folder.path} holds a tensor for `{key}`, for which there is no place here.")


_OURS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "ia3_l": "ia3_l",
}


def _ours(kind: str, tensor: Tensor) -> Tensor:
    """A tensor of peft's in our layout: B is transposed, kernels are flat, and an embedding's A stands upright."""
    if kind in ("lora_B.weight", "lora_embedding_B"):
        return tensor.flatten(1).t() if tensor.dim() > 2 else tensor.t()
    if kind == "lora_embedding_A":
        return tensor.t()
    if kind == "lora_A.weight":
        return tensor.flatten(1)
    return tensor if kind == "prompt_embeddings" else tensor.flatten()
