"""A folder with one adapter, in the format of Hugging Face's peft: a configuration, the tensors, and our own notes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_tricks.errors import CheckpointError
from lightning_tricks.storage import WeightsFile, write_weights
from lightning_tricks.storage._atomic import atomic_file
from lightning_tricks.storage._space import disk_errors

__all__ = ["AdapterFolder", "read_folder", "write_folder"]

CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "lightning_tricks.json"
PREFIX = "base_model.model."  # what peft puts before the base's own names


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder holds.

    Args:
        config: peft's configuration.
        tensors: by the names of the base, without peft's prefix.
        base: fingerprints of the base's frozen tensors; empty if the folder does not say.
        path: where it was read from.
        tied: names of the base's tensors that are one and the same, those of each together.
        transposed: the linear layers whose weight is (inputs, outputs); None if the folder does not say.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base: dict[str, dict[str, str]] = field(default_factory=dict)
    path: Path = Path()
    tied: list[list[str]] = field(default_factory=list)
    transposed: list[str] | None = None


def write_folder(folder: Path, content: AdapterFolder) -> None:
    """Write the files, each complete or not at all; the configuration, without which it is no adapter, comes last.

    Raises:
        CheckpointError: if the disk refuses one.
    """
    learned = {_outside(name): tensor.contiguous() for name, tensor in content.tensors.items()}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in learned.items()}
    write_weights(folder / WEIGHTS, layout, learned.items(), {"format": "pt"})
    _write_json(folder / NOTES, {"base": content.base, "tied": content.tied, "transposed": content.transposed})
    _write_json(folder / CONFIG, content.config)


def _outside(name: str) -> str:
    return name if name == "prompt_embeddings" else PREFIX + name


def read_folder(folder: Path) -> AdapterFolder:
    """Read a folder that peft or `write_folder` wrote.

    Raises:
        CheckpointError: if a file is missing or malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no adapter folder {folder}: check the path.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise CheckpointError(f"{folder} lacks `{name}`, and holds {present}: it is no adapter, or not all of it.")
    config = _read_json(folder / CONFIG)
    if "peft_type" not in config:
        raise CheckpointError(f"{folder / CONFIG} does not say `peft_type`: it is not the configuration of an adapter.")
    file = WeightsFile(folder / WEIGHTS)
    tensors = {name.removeprefix(PREFIX): file.tensor(name) for name in file.names}
    notes = _read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    return AdapterFolder(config, tensors, notes.get("base", {}), folder, notes.get("tied", []), notes.get("transposed"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    with disk_errors(path, len(text)), atomic_file(path) as partial:
        partial.write_text(text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # bytes that are no text are one as well
        raise CheckpointError(f"{path} is not JSON ({error}): it is damaged. Use another copy.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object: it is damaged.")
    return content
