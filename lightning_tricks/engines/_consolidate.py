"""Any engine's checkpoint as one safetensors file, a tensor at a time."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._read import explained, fsdp2_entries, fsdp2_reader
from lightning_tricks.engines._skim import Inert, Note, skim
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage import WeightsFile, write_weights

__all__ = ["Whole", "consolidate", "find_weights", "zero_files", "zero_folder"]

_COMPILED = "_orig_mod."
_FSDP2 = "state_dict."


@dataclass(frozen=True)
class Whole:
    """A tensor of the module, and how to read it whole.

    Attributes:
        dtype: as it will be read.
        shape: as it will be read.
        read: reads it, on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel() * self.dtype.itemsize


def consolidate(path: str | Path, out: str | Path, *, progress: Callable[[int, int], object] | None = None) -> None:
    """Write the weights of any engine's checkpoint to one safetensors file, which loads strictly into the plain module.

    Nothing in the checkpoint is run, DeepSpeed need not be installed, and `out` appears only when it is complete. A
    tensor keeps the dtype in which it was saved; trained ones of ZeRO come from their fp32 masters. Memory: the largest
    tensor; beside it, of an FSDP2 folder, the largest part of a tensor that lies in one file.

    Args:
        path: a checkpoint file of one device or DDP, a ZeRO folder, an FSDP2 folder, or a safetensors file.
        out: the `.safetensors` file to write.
        progress: called after every tensor with the bytes that are written and the bytes in all.

    Raises:
        CheckpointError: if there is no checkpoint, or it is truncated, incomplete or not of these kinds.
        MisconfigurationError: if `out` is not the name of a new or another safetensors file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 3}, folder / "plain.ckpt")
        >>> consolidate(folder / "plain.ckpt", folder / "plain.safetensors")
        >>> WeightsFile(folder / "plain.safetensors").tensor("w")
        tensor([1., 1.])
    """
    path, out = Path(path), Path(out)
    _refuse_target(path, out)
    with explained(path):
        weights = find_weights(path)
    total = sum(whole.nbytes() for whole in weights.values())

    def read(whole: Whole) -> Tensor:
        with explained(path):
            return whole.read()

    def entries() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, whole in weights.items():
            yield name, read(whole)  # and no variable, which would keep it while the next one is read
            done += whole.nbytes()
            if progress is not None:
                progress(done, total)

    layout = {name: (whole.dtype, whole.shape) for name, whole in weights.items()}
    write_weights(out, layout, entries(), {"format": "pt", "checkpoint": path.name})


def find_weights(path: Path) -> dict[str, Whole]:
    """The module's tensors in a checkpoint, under plain names, none of them read yet.

    Args:
        path: as for `consolidate`.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}: check the path.")
    if path.suffix == ".safetensors":
        found = _of_weights_file(WeightsFile(path))
    elif path.is_file():
        found = _of_state_dict(_entry(skim(path), "state_dict"))
    elif (path / ".metadata").exists():
        found = _of_fsdp2(path)
    else:
        found = _of_zero(path)
    plain = {name.replace(_COMPILED, ""): whole for name, whole in found.items()}
    if len(plain) < len(found):
        raise CheckpointError(f"{path} holds a tensor twice, with and without `{_COMPILED}`: save it again.")
    return plain


def zero_folder(path: Path) -> Path:
    """The folder in a DeepSpeed checkpoint that its newest files are in."""
    latest = path / "latest"
    tag = latest.read_text().strip() if latest.is_file() else "checkpoint"
    folder = path / tag
    if Path(tag).name != tag or not folder.is_dir():
        raise CheckpointError(f"{path} is a folder that neither ZeRO nor FSDP2 wrote: name the checkpoint itself.")
    return folder


def _refuse_target(path: Path, out: Path) -> None:
    if out.suffix != ".safetensors" or out.is_dir():
        raise MisconfigurationError(f"`{out}` must be the name of a file that ends in .safetensors.")
    if out.exists() and path.exists() and out.samefile(path):
        raise MisconfigurationError(f"`{out}` is the checkpoint itself: give the new file another name.")


# -- files ---------------------------------------------------------------------------------------------------------


def _of_weights_file(file: WeightsFile) -> dict[str, Whole]:
    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: file.tensor(name)

    return {name: Whole(dtype, shape, reader(name)) for name, (dtype, shape) in file.layout.items()}


def _of_state_dict(state: Mapping[str, Any]) -> dict[str, Whole]:
    for name, value in state.items():
        if not isinstance(value, Note):
            raise CheckpointError(f"`{name}` in the state dict is no plain tensor: safetensors cannot hold it.")
    return {name: Whole(note.dtype, note.shape, note.tensor) for name, note in state.items()}


def _entry(content: Any, name: str) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f"it holds no {name}")
    return content[name]


# -- FSDP2 ---------------------------------------------------------------------------------------------------------


def _of_fsdp2(path: Path) -> dict[str, Whole]:
    read = fsdp2_reader(path)

    def whole(name: str, entry: Any) -> Whole:
        return Whole(entry.properties.dtype, tuple(entry.size), lambda: read(name, entry))

    return {name.removeprefix(_FSDP2): whole(name, entry) for name, entry in fsdp2_entries(path).items()}


# -- ZeRO ----------------------------------------------------------------------------------------------------------

Piece = tuple[Note, int, int]


def zero_files(path: Path) -> tuple[int, list[Any], list[Any]]:
    """The stage of a ZeRO folder, the content of its model files, and that of its optimizer files, by rank."""
    folder = zero_folder(path)
    models = [skim(file) for file in _ranked(folder, "*_model_states.pt")]
    states = [_entry(skim(file), "optimizer_state_dict") for file in _ranked(folder, "*_optim_states.pt")]
    if not models:
        raise ValueError("it holds no model states")
    stage = _stage(states)
    _refuse_missing(folder, models, states, stage)
    return stage, models, states


def _of_zero(path: Path) -> dict[str, Whole]:
    stage, models, states = zero_files(path)
    module = _entry(models[0], "module")
    kept = module if stage < 3 else {name: module[name] for name in models[0]["buffer_names"] if name in module}
    found = _of_state_dict({name: value for name, value in kept.items() if value is not None})
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
    stage = _entry(states[0], "zero_stage")
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
