"""A checkpoint of any engine that is open, with nothing of its weights read; and a new one, written as they come."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import skip_data

from lightning_tricks.engines._consolidate import find_weights
from lightning_tricks.engines._read import explained, load_rest
from lightning_tricks.engines._skim import Note, skim
from lightning_tricks.engines._zero_files import Whole
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.storage import write_weights
from lightning_tricks.storage._atomic import atomic_file
from lightning_tricks.storage._space import disk_errors

__all__ = ["Layout", "Stored", "open_checkpoint", "write_checkpoint"]

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Stored:
    """An open checkpoint.

    Attributes:
        path: where it lies.
        weights: the module's tensors by plain names, none of them read.
        rest: what Lightning stored beside them (`hyper_parameters`, `global_step`, ...); tensors in it are mapped.
    """

    path: Path
    weights: Mapping[str, Whole]
    rest: Mapping[str, Any]

    @property
    def layout(self) -> Layout:
        """Name -> (dtype, shape)."""
        return {name: (whole.dtype, whole.shape) for name, whole in self.weights.items()}

    @property
    def step(self) -> int:
        """The optimizer steps taken; -1 if it does not say."""
        step = self.rest.get("global_step")
        return step if isinstance(step, int) else -1

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in memory of its own.

        Raises:
            CheckpointError: if it cannot be read.
        """
        with explained(self.path):
            return self.weights[name].read()

    def elements_into(self, name: str, values: Tensor, start: int) -> None:
        """Fill a vector with as many elements of a tensor that lies in one piece, from `start` on.

        Raises:
            CheckpointError: if they cannot be read.
            ValueError: if the tensor has to be put together first (`weights[name].fill` is None).
        """
        fill = self.weights[name].fill
        if fill is None:
            raise ValueError(f"`{name}` cannot be read in parts")
        with explained(self.path):
            fill(values, start)


def open_checkpoint(path: str | Path) -> Stored:
    """Open a checkpoint of any engine: its tensors are found, and read only when they are asked for.

    Args:
        path: a checkpoint file of one device or DDP, a ZeRO folder, an FSDP2 folder, or a safetensors file.

    Raises:
        CheckpointError: if there is no checkpoint, or it is truncated, incomplete or not of these kinds. Nothing in it
            is run, and DeepSpeed need not be installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "plain.ckpt"
        >>> torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 3}, path)
        >>> stored = open_checkpoint(path)
        >>> stored.step, stored.layout, stored.tensor("w")
        (3, {'w': (torch.float32, (2,))}, tensor([1., 1.]))
    """
    path = Path(path)
    with explained(path):
        return Stored(path, find_weights(path), load_rest(path) if path.exists() else {})


def write_checkpoint(
    path: str | Path, layout: Layout, entries: Iterable[tuple[str, Tensor]], rest: Mapping[str, Any]
) -> None:
    """Write weights, one tensor in memory at a time, to a checkpoint of one device or to a safetensors file.

    It appears only when it is complete. A checkpoint holds `rest` beside the weights; a safetensors file holds those
    entries of it that are strings or numbers, as strings.

    Args:
        path: the file, which ends in `.ckpt` or `.safetensors`.
        layout: name -> (dtype, shape) of every tensor, in the order in which `entries` gives them.
        entries: (name, tensor) pairs, consumed one at a time.
        rest: what the checkpoint holds beside `state_dict`.

    Raises:
        MisconfigurationError: for another suffix, or entries that are not those of the layout.
        CheckpointError: if the disk refuses it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new.ckpt"
        >>> write_checkpoint(path, {"w": (torch.float32, (2,))}, [("w", torch.ones(2))], {"global_step": 3})
        >>> torch.load(path, weights_only=True)
        {'global_step': 3, 'state_dict': {'w': tensor([1., 1.])}}
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        plain = {name: str(value) for name, value in rest.items() if isinstance(value, str | int | float)}
        write_weights(path, layout, entries, {"format": "pt", **plain})
        return
    if path.suffix != ".ckpt":
        raise MisconfigurationError(f"`{path}` must be the name of a file that ends in .ckpt or .safetensors.")
    needed = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
    with disk_errors(path, needed), atomic_file(path) as partial:
        state = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
        with skip_data():  # room for the bytes is left in the file, and the memory that they would take is not touched
            torch.save({**rest, "state_dict": state}, partial)
        found = skim(partial)
        with partial.open("r+b") as stream:
            for note, tensor in _tensors({name: found[name] for name in rest}, rest):
                _put(stream, note, tensor)
            _fill(stream, found["state_dict"], layout, entries)


def _tensors(found: Any, value: Any) -> Iterator[tuple[Note, Tensor]]:
    """The tensors in plain containers, and their places in the file."""
    if isinstance(value, Tensor):
        yield found, value
    elif isinstance(value, Mapping) and isinstance(found, Mapping):
        for name, item in value.items():
            yield from _tensors(found[name], item)
    elif isinstance(value, list | tuple):
        for place, item in zip(found, value, strict=True):
            yield from _tensors(place, item)


def _fill(stream: BinaryIO, places: Mapping[str, Note], layout: Layout, entries: Iterable[tuple[str, Tensor]]) -> None:
    expected = iter(places.items())
    for name, tensor in entries:
        wanted, note = next(expected, ("nothing more", None))
        if note is None or wanted != name or layout[name] != (tensor.dtype, tuple(tensor.shape)):
            raise MisconfigurationError(
                f"the layout expects `{wanted}` and the entries give `{name}`, {tensor.dtype}, {tuple(tensor.shape)}."
            )
        _put(stream, note, tensor)
        del tensor  # before the next one is made
    if (missing := next(expected, None)) is not None:
        raise MisconfigurationError(f"the entries end before `{missing[0]}`, which the layout names.")


def _put(stream: BinaryIO, note: Note, tensor: Tensor) -> None:
    stream.seek(note.start)
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    stream.write(memoryview(array))
