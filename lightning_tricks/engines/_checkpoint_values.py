"""Values kept beside the master shards, in checkpoints: within the file, or as a file within the folder."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_tricks.engines._shards import Shard
from lightning_tricks.errors import CheckpointError

__all__ = ["add_part", "add_whole", "cut", "parts_of", "stored", "write_parts"]

_PARTS = "lightning_tricks_parts"  # of a checkpoint that is being written: file name -> what writes it
_SPACE, _VALUES = "lightning_tricks", "values"

Writer = Callable[[Path], None]


def add_whole(checkpoint: dict[str, Any], name: str, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into the checkpoint itself.

    Example:
        >>> import torch
        >>> checkpoint = {}
        >>> add_whole(checkpoint, "average", {"w": torch.ones(1)})
        >>> stored(checkpoint, "average")
        {'w': tensor([1.])}
    """
    _table(checkpoint)[name] = dict(tensors)


def add_part(checkpoint: dict[str, Any], name: str, write: Writer) -> None:
    """Let the strategy, which writes a folder, write one more file into it."""
    file = f"values-{len(_table(checkpoint))}.safetensors"
    _table(checkpoint)[name] = file
    checkpoint.setdefault(_PARTS, {})[file] = write


def parts_of(checkpoint: dict[str, Any]) -> dict[str, Writer]:
    """The files to write beside a checkpoint's own, taken out of it."""
    parts: dict[str, Writer] = checkpoint.pop(_PARTS, {})
    return parts


def write_parts(parts: Mapping[str, Writer], folder: Path) -> None:
    """Write them, before the folder's own files: what fails here fails on every rank. Collective."""
    for file, write in parts.items():
        write(folder / file)


def stored(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Tensor] | str | None:
    """What a checkpoint that was read holds under a name: whole tensors, or the name of a file in its folder."""
    values: Mapping[str, Tensor] | str | None = checkpoint.get(_SPACE, {}).get(_VALUES, {}).get(name)
    return values


def cut(wholes: Mapping[str, Tensor], shards: Iterable[Shard], trained: Iterable[str]) -> dict[str, Tensor]:
    """This rank's parts of whole tensors, in fp32, where the shards lie.

    Raises:
        CheckpointError: if a name is missing or too many, or a size differs.
    """
    held = list(shards)
    names = [*trained]
    for name in [*names, *wholes]:
        if name not in wholes or name not in names:
            where = "the module does not train" if name in wholes else "the checkpoint does not hold"
            raise CheckpointError(f"the values in the checkpoint do not fit: `{name}` is one that {where}.")
    for shard in held:
        if tuple(wholes[shard.name].shape) != shard.shape:
            raise CheckpointError(
                f"the values in the checkpoint do not fit: `{shard.name}` is of shape"
                f" {list(wholes[shard.name].shape)} there and {list(shard.shape)} in the module."
            )
    return {
        shard.name: wholes[shard.name].reshape(-1)[shard.start : shard.stop].to(shard.values.device).float().clone()
        for shard in held
    }


def _table(checkpoint: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = checkpoint.setdefault(_SPACE, {}).setdefault(_VALUES, {})
    return table
