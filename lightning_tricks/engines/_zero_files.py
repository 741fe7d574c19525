"""The tensors of a module in a file or in a ZeRO folder, found without reading them."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._skim import Inert, Note, skim
from lightning_tricks.errors import CheckpointError

__all__ = ["Whole", "entry_of", "model_files", "of_state_dict", "of_zero", "zero_files", "zero_folder"]

Piece = tuple[Note, int, int]


@dataclass(frozen=True)
class Whole:
    """A tensor of the module, and how to read it whole.

    Attributes:
        dtype: as it will be read.
        shape: as it will be read.
        read: reads it, on the CPU.
        fill: fills a vector with as many of its elements, from a place on, if it lies in its file in one piece.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    fill: Callable[[Tensor, int], None] | None = None

    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel() * self.dtype.itemsize


def of_state_dict(state: Mapping[str, Any]) -> dict[str, Whole]:
    """The tensors of a state dict that was skimmed."""
    for name, value in state.items():
        if not isinstance(value, Note):
            raise CheckpointError(f"`{name}` in the state dict is no plain tensor: safetensors cannot hold it.")
    return {name: _of_note(note) for name, note in state.items()}


def _of_note(note: Note) -> Whole:
    return Whole(note.dtype, note.shape, note.tensor, note.elements_into if note.is_flat() else None)


def entry_of(content: Any, name: str) -> Any:
    """An entry of a file's content, or an error that says what is missing."""
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f"it holds no {name}")
    return content[name]


# -- ZeRO ----------------------------------------------------------------------------------------------------------


def zero_folder(path: Path) -> Path:
    """The folder in a DeepSpeed checkpoint that its newest files are in."""
    latest = path / "latest"
    tag = latest.read_text().strip() if latest.is_file() else "checkpoint"
    folder = path / tag
    if Path(tag).name != tag or not folder.is_dir():
        raise CheckpointError(f"{path} is a folder that neither ZeRO nor FSDP2 wrote: name the checkpoint itself.")
    return folder


def model_files(folder: Path) -> list[Path]:
    """The files with a module's weights, or one rank's parts of them, and all that Lightning stored beside."""
    return _ranked(folder, "*_model_states.pt")


def zero_files(path: Path) -> tuple[int, list[Any], list[Any]]:
    """The stage of a ZeRO folder, the content of its model files, and that of its optimizer files, by rank."""
    folder = zero_folder(path)
    models = [skim(file) for file in model_files(folder)]
    states = [entry_of(skim(file), "optimizer_state_dict") for file in _ranked(folder, "*_optim_states.pt")]
    if not models:
        raise ValueError("it holds no model states")
    stage = _stage(states)
    _refuse_missing(folder, models, states, stage)
    return stage, models, states


def of_zero(path: Path) -> dict[str, Whole]:
    """The tensors of a ZeRO folder: trained ones from their fp32 masters."""
    stage, models, states = zero_files(path)
    module = entry_of(models[0], "module")
    kept = module if stage < 3 else {name: module[name] for name in models[0]["buffer_names"] if name in module}
    found = of_state_dict({name: value for name, value in kept.items() if value is not None})
    if stage == 3:
        found |= _frozen_parts(models)
    masters = _equal_parts(models, states) if stage == 3 else _flat_groups(models, states)
    found |= masters
    for alias, name in dict(models[0].get("shared_params") or {}).items():
        if name in found:
            found[alias] = found[name]
    return found


def _ranked(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def _stage(states: list[Any]) -> int:
    """ZeRO's stage, an enumeration in the file; 0 without ZeRO."""
    if not states:
        return 0
    stage = entry_of(states[0], "zero_stage")
    return int(stage.args[0] if isinstance(stage, Inert) else stage)


def _refuse_missing(folder: Path, models: list[Any], states: list[Any], stage: int) -> None:
    count = states[0]["partition_count"] if states else 0
    needed = max(count) if isinstance(count, list) else int(count)
    if len(states) != needed or (stage == 3 and len(models) != needed):
        raise ValueError(f"{needed} processes wrote it, and the files of {len(states)} are in {folder.name}")


def _shapes(groups: list[Mapping[str, Any]]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(map(int, size.args[0])) for name, size in group.items()} for group in groups]


def _flat_groups(models: list[Any], states: list[Any]) -> dict[str, Whole]:
    """ZeRO-1/2: a group's parameters one after another in a vector, which the ranks cut into equal parts."""
    found: dict[str, Whole] = {}
    for index, shapes in enumerate(_shapes(models[0]["param_shapes"]) if states else []):
        vector = [state["single_partition_of_fp32_groups"][index] for state in states]
        paddings = states[0].get("param_alignment_paddings")
        gaps = paddings[index] if paddings is not None else [0] * len(shapes)
        start = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            found[name] = _pieced(shape, _cut(vector, start, start + math.prod(shape)))
            start += math.prod(shape) + gap
    return found


def _equal_parts(models: list[Any], states: list[Any]) -> dict[str, Whole]:
    """ZeRO-3: every parameter cut into equal parts, the last one padded; a rank's parts one after another."""
    found, start = {}, 0
    for shapes in _shapes(models[0]["param_shapes"]):
        for name, shape in shapes.items():
            size = math.ceil(math.prod(shape) / len(states))
            filled = [min(size, max(0, math.prod(shape) - rank * size)) for rank in range(len(states))]
            pieces = [
                piece
                for state, count in zip(states, filled, strict=True)
                for piece in _cut(state["fp32_flat_groups"], start, start + count)
            ]
            found[name], start = _pieced(shape, pieces), start + size
    return found


def _frozen_parts(models: list[Any]) -> dict[str, Whole]:
    shapes = _shapes([models[0].get("frozen_param_shapes") or {}])[0]
    fragments = {name: [model["frozen_param_fragments"][name] for model in models] for name in shapes}
    return {name: _pieced(shape, _cut(fragments[name], 0, math.prod(shape))) for name, shape in shapes.items()}


def _cut(vector: list[Note], start: int, stop: int) -> list[Piece]:
    """The elements `start` to `stop` of some vectors laid end to end."""
    pieces, begin = [], 0
    for note in vector:
        end = begin + note.numel()
        if max(start, begin) < min(stop, end):
            pieces.append((note, max(start, begin) - begin, min(stop, end) - begin))
        begin = end
    if stop > begin:
        raise ValueError(f"it ends at element {begin}, before {stop}")
    return pieces


def _pieced(shape: tuple[int, ...], pieces: list[Piece]) -> Whole:
    dtype = pieces[0][0].dtype if pieces else torch.float32

    def read() -> Tensor:
        whole, at = torch.empty(math.prod(shape), dtype=dtype), 0
        for note, start, stop in pieces:
            note.elements_into(whole[at : at + stop - start], start)
            at += stop - start
        return whole.view(shape)

    return Whole(dtype, shape, read)
