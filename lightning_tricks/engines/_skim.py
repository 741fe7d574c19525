"""What a pickled file holds, read without importing or running anything, and its tensors a slice at a time."""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_tricks.errors import CheckpointError

__all__ = ["Inert", "Note", "skim", "skim_pickle"]

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
_TENSORS = {"_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_WRAPPED = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: OrderedDict(),  # its argument is what makes the missing: a class
}


class Inert:
    """Stands for an object of any class: it keeps what the pickle says of it, and does nothing.

    Attributes:
        cls: the name of its class or function, with the module.
        args: what it would have been made of.
        state: what would have been set on it.
    """

    cls = ""

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> "Inert":
        """As a pickle makes objects: by a call, or without one."""
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, []
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Keep an item of what would have been a list."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Keep items of what would have been a list."""
        self.items.extend(values)

    def add(self, value: Any) -> None:
        """Keep an item of what would have been a set."""
        self.items.append(value)

    def __repr__(self) -> str:
        return f"<{self.cls}>"


@dataclass(frozen=True)
class Note:
    """Where a tensor lies in a file that `torch.save` wrote.

    Attributes:
        path: the file.
        dtype: the tensor's dtype.
        shape: its shape.
        stride: its stride, in elements.
        start: the byte of the file at which its storage's first element of this tensor lies.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def is_flat(self) -> bool:
        """Whether its elements lie in the file in their order."""
        return self.stride == torch.empty(self.shape, device="meta").stride()

    def tensor(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        if not self.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        values = self._read(0, span).as_strided(self.shape, self.stride)
        return values if values.is_contiguous() else values.contiguous()

    def elements_into(self, values: Tensor, start: int) -> None:
        """Fill a vector with as many elements of this one, from `start` on."""
        if not self.is_flat() or not 0 <= start <= start + values.numel() <= self.numel():
            raise ValueError(
                f"no {values.numel()} elements in a row from {start} on in a tensor of shape {list(self.shape)}"
            )
        self._fill(values, start)

    def _read(self, start: int, stop: int) -> Tensor:
        tensor = torch.empty(stop - start, dtype=self.dtype)
        self._fill(tensor, start)
        return tensor

    def _fill(self, values: Tensor, start: int) -> None:
        if not values.numel():
            return
        array: Any = values.view(torch.uint8).numpy()
        read, view = 0, memoryview(array)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.start + start * self.dtype.itemsize)
            while read < len(view) and (count := stream.readinto(view[read:])):
                read += count
        if read < len(view):
            raise EOFError(f"{self.path.name} ends within a tensor")


def skim(path: Path) -> Any:
    """The content of a file that `torch.save` wrote, with a `Note` for every tensor and an `Inert` for every object.

    No tensor is read, no class is imported, nothing in the file is run.

    Args:
        path: the file.

    Raises:
        CheckpointError: if the file is in torch's format from before 1.6, which cannot be read in parts.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "some.pt"
        >>> torch.save({"w": torch.arange(6).view(2, 3).T, "where": Path("/somewhere")}, path)
        >>> found = skim(path)
        >>> found["w"].shape, found["w"].dtype, found["where"].cls
        ((3, 2), torch.int64, 'pathlib.PosixPath')
        >>> found["w"].tensor().tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is truncated, or not a checkpoint, or of torch before 1.6: use another one, or load it with torch"
            " and save it again."
        )
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        records = {item.filename.split("/", 1)[-1]: item for item in archive.infolist()}
        starts = {name: _data_start(stream, item) for name, item in records.items() if name.startswith("data/")}
        content = archive.read(records["data.pkl"])
    return _Skimmer(io.BytesIO(content), path, starts).load()


def skim_pickle(path: Path) -> tuple[Any, set[tuple[str, str]]]:
    """The content of a plain pickle, with an `Inert` for every object, and the (module, name) of all that it names.

    Args:
        path: the file.
    """
    skimmer = _Skimmer(io.BytesIO(path.read_bytes()), path, {})
    return skimmer.load(), skimmer.named


class _Skimmer(pickle.Unpickler):
    """Finds no class, so that nothing in a pickle can run."""

    def __init__(self, stream: BinaryIO, path: Path, starts: dict[str, int]) -> None:
        super().__init__(stream)
        self._path, self._starts = path, starts
        self._classes: dict[tuple[str, str], Any] = {}
        self.named: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.named.add((module, name))
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch._utils" and name in _TENSORS:
            return self._note
        if module == "torch._utils" and name in _WRAPPED:
            return _first
        if module == "torch._tensor" and name == "_rebuild_from_type_v2":
            return _plain_tensor
        key = (module, name)
        if key not in self._classes:
            self._classes[key] = type(name, (Inert,), {"cls": f"{module}.{name}"})
        return self._classes[key]

    def persistent_load(self, pid: Any) -> tuple[Any, int]:
        """A storage: its dtype (where the file says it) and where it begins."""
        _, kind, key, *_ = pid
        name = kind.cls.rpartition(".")[2]
        return _STORAGES[name], self._starts[f"data/{key}"]

    def _note(self, storage: tuple[torch.dtype, int], offset: int, shape: Any, stride: Any, *rest: Any) -> Note:
        dtype, start = storage
        named = [getattr(torch, getattr(item, "cls", "").removeprefix("torch."), None) for item in rest]
        dtype = next((item for item in named if isinstance(item, torch.dtype)), dtype)
        return Note(self._path, dtype, _sizes(shape), _sizes(stride), start + offset * dtype.itemsize)


def _first(value: Any, *_: Any) -> Any:
    return value


def _plain_tensor(rebuild: Any, _: Any, args: Any, *__: Any) -> Any:
    """A tensor with attributes, as DeepSpeed saves some: `rebuild` is what `find_class` gave."""
    return rebuild(*args)


def _sizes(shape: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in (shape.args[0] if isinstance(shape, Inert) else shape))


def _data_start(stream: BinaryIO, item: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin; torch stores them as they are."""
    if item.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{stream.name} is compressed, which no checkpoint is.")
    stream.seek(item.header_offset + 26)
    head = stream.read(4)
    lengths = int.from_bytes(head[:2], "little") + int.from_bytes(head[2:], "little")
    return item.header_offset + 30 + lengths
