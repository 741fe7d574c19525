"""The tensors of peft's adapters put into ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.errors import CheckpointError
from lightning_tricks.mixins._adapter_folder import AdapterFolder
from lightning_tricks.mixins._method import layers_of
from lightning_tricks.mixins._peft_method import beside, parts

__all__ = ["fill"]


def fill(module: nn.Module, name: str, folder: AdapterFolder) -> None:
    """Put the folder's tensors into the adapter of this name.

    Raises:
        CheckpointError: if one is missing, too many, or has another shape.
    """
    layers = layers_of(module, name)
    wanted: dict[str, Tensor] = {}
    for path, layer in layers.items():
        wanted |= {f"{path}.{kind}": value for kind, value in layer.adapter_parameters(name).items()}
    given = {_place(folder, path, kind): _ours(kind, t) for path, kind, t in parts(folder)}
    others = beside(folder)
    entries = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wanted |= {key: entries[key] for key in others if key in entries}
    given |= others
    _require_the_same_names(folder, wanted, given)
    with torch.no_grad():
        for key, value in given.items():
            if wanted[key].shape != value.shape:
                raise CheckpointError(
                    f"{folder.path}: `{key}` has the shape {list(value.shape)}, and this module's has "
                    f"{list(wanted[key].shape)}."
                )
        for key, value in given.items():
            wanted[key].copy_(value)


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
