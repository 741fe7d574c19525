"""Weights in one safetensors file, written and read a tensor at a time."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage._atomic import atomic_file
from lightning_tricks.storage._space import disk_errors

__all__ = ["WeightsFile", "write_weights"]

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def write_weights(
    path: Path, layout: Layout, entries: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Stream tensors into a safetensors file that appears under `path` only when it is complete.

    The data go to a hidden sibling, which is flushed to the disk and renamed; if anything raises, it is removed and
    an older file under `path` is left as it was. Memory: one tensor at a time.

    Args:
        path: the file to write; its folder is created.
        layout: name -> (dtype, shape) of every tensor, in the order in which `entries` gives them.
        entries: (name, tensor) pairs on any device, consumed one at a time.
        metadata: strings to store in the file's header.

    Raises:
        CheckpointError: if the disk refuses it, being full or not writable.
        MisconfigurationError: if `entries` differs from `layout`, or a dtype has no place in the format.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> write_weights(path, {"w": (torch.float32, (2, 3))}, [("w", torch.ones(2, 3))], {"step": "7"})
        >>> WeightsFile(path).metadata
        {'step': '7'}
    """
    head = _encode_header(layout, metadata or {})
    needed = len(head) + sum(_size(dtype, shape) for dtype, shape in layout.values())
    with disk_errors(path, needed), atomic_file(Path(path)) as partial, partial.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        _write_entries(stream, layout, entries)


class WeightsFile:
    """A safetensors file to read from, a tensor or some rows at a time. Opening it reads the header alone.

    Args:
        path: the file.

    Attributes:
        path: the file.
        layout: name -> (dtype, shape), in the order of the file.
        metadata: the strings stored with it.

    Raises:
        CheckpointError: if the file is absent, truncated or not in the safetensors format.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
        >>> write_weights(path, {"w": (torch.int64, (4,))}, [("w", torch.arange(4))])
        >>> file = WeightsFile(path)
        >>> file.names
        ['w']
        >>> file.tensor("w")
        tensor([0, 1, 2, 3])
        >>> file.rows("w", 1, 3)
        tensor([1, 2])
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        head, self._data = _read_header(self.path)
        self.metadata: dict[str, str] = dict(head.pop("__metadata__", {}))
        head = dict(sorted(head.items(), key=lambda item: item[1]["data_offsets"]))
        self._starts = {name: int(entry["data_offsets"][0]) for name, entry in head.items()}
        self.layout = {name: (_DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in head.items()}
        self._refuse_truncated()

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in the order of the file."""
        return list(self.layout)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in memory of its own.

        Raises:
            CheckpointError: if the file holds no tensor of that name.
        """
        dtype, shape = self._entry(name)
        return self._read(name, 0, math.prod(shape), dtype).view(shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows `start` to `stop` (exclusive) of a tensor's first dimension, without reading the others.

        Raises:
            CheckpointError: if the file holds no tensor of that name.
            IndexError: if the rows are not in the tensor.
        """
        dtype, shape = self._entry(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"`{name}` has the shape {list(shape)}: it holds no rows {start} to {stop}.")
        row = math.prod(shape[1:])
        return self._read(name, start * row, stop * row, dtype).view(stop - start, *shape[1:])

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """The elements `start` to `stop` (exclusive) of the flattened tensor, as a vector.

        Raises:
            CheckpointError: if the file holds no tensor of that name.
            IndexError: if the elements are not in the tensor.
        """
        dtype, shape = self._entry(name)
        if not 0 <= start <= stop <= math.prod(shape):
            raise IndexError(f"`{name}` has the shape {list(shape)}: it holds no elements {start} to {stop}.")
        return self._read(name, start, stop, dtype)

    def _entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name not in self.layout:
            raise CheckpointError(f"{self.path} holds no tensor `{name}`; it holds {len(self.layout)} others.")
        return self.layout[name]

    def _read(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(stop - start, dtype=dtype)
        with self.path.open("rb") as stream:
            stream.seek(self._data + self._starts[name] + start * dtype.itemsize)
            stream.readinto(_bytes_of(tensor))
        return tensor

    def _refuse_truncated(self) -> None:
        ends = [self._starts[name] + _size(dtype, shape) for name, (dtype, shape) in self.layout.items()]
        needed, present = self._data + max(ends, default=0), self.path.stat().st_size
        if present != needed:
            raise CheckpointError(
                f"{self.path} has {present} bytes and its header promises {needed}: it is truncated or damaged."
                " Use another checkpoint, or write this one again."
            )


def _encode_header(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in _CODES:
            raise MisconfigurationError(f"`{name}` is {dtype}, which safetensors cannot hold: convert it first.")
        end = offset + _size(dtype, shape)
        head[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head).encode()
    return text + b" " * (-len(text) % 8)


def _write_entries(stream: BinaryIO, layout: Layout, entries: Iterable[tuple[str, Tensor]]) -> None:
    expected = iter(layout.items())
    for name, tensor in entries:
        wanted = next(expected, None)
        if wanted != (name, (tensor.dtype, tuple(tensor.shape))):
            raise MisconfigurationError(
                f"the layout expects {wanted} and the entries give ({name!r}, ({tensor.dtype}, {tuple(tensor.shape)}))."
            )
        stream.write(_bytes_of(tensor.detach().cpu().contiguous()))
        del tensor  # before the next one is made
    if (missing := next(expected, None)) is not None:
        raise MisconfigurationError(f"the entries end before `{missing[0]}`, which the layout names.")
    stream.flush()
    os.fsync(stream.fileno())


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The decoded header and the position at which the data begin."""
    if not path.is_file():
        raise CheckpointError(f"there is no weights file {path}: check the path.")
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= _LARGEST_HEADER else b""
    try:
        head = json.loads(text)
        if not isinstance(head, dict) or len(text) != length:
            raise ValueError("not a header")
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is truncated: use another checkpoint, or write this one again."
        ) from error
    return head, 8 + length


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
