"""A checkpoint of any engine, file or folder, as whole fp32 tensors on the CPU."""

import contextlib
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._allowed import allow_hyper_parameters
from lightning_tricks.engines._skim import skim_pickle
from lightning_tricks.engines._zero_files import model_files, of_zero, zero_folder
from lightning_tricks.errors import CheckpointError
from lightning_tricks.storage import WeightsFile

__all__ = ["explained", "fsdp2_entries", "fsdp2_reader", "load_rest", "read_checkpoint"]

_FSDP2 = "state_dict."
_DESCRIPTIONS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
_DESCRIPTIONS |= {("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib", "Path")}
_BROKEN = (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, pickle.UnpicklingError)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that any engine wrote, without a Trainer and on one process.

    Args:
        path: a Lightning checkpoint file, a DeepSpeed folder, an FSDP2 folder, or a weights file (`.safetensors`).

    Returns:
        What Lightning stored (`hyper_parameters`, `global_step`, callbacks, ...), with `state_dict` holding whole CPU
        tensors under plain names, floating-point ones in fp32. Peak memory: the whole model.

    Raises:
        CheckpointError: if there is none, or it is truncated or incomplete, or holds objects other than tensors,
            plain types, paths and OmegaConf's containers. Nothing in it is run, and DeepSpeed need not be installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "plain.ckpt"
        >>> torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 3}, path)
        >>> read_checkpoint(path)["state_dict"]
        {'w': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}: check the path.")
    with explained(path):
        checkpoint = _read(path)
    state = {name.replace("_orig_mod.", ""): _single(tensor) for name, tensor in checkpoint["state_dict"].items()}
    return {"hyper_parameters": {}, **checkpoint, "state_dict": state}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a checkpoint is read into one error that names it."""
    try:
        yield
    except _BROKEN as error:
        if foreign := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds an object of `{foreign[1]}`, which could run code: if you trust it, allow the class with"
                f" `torch.serialization.add_safe_globals([{foreign[1].rpartition('.')[2]}])`."
            ) from error
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {_first_line(error)}): it is truncated, incomplete or not"
            " a checkpoint. Use another one, or save this one again."
        ) from error


def load_rest(path: Path) -> dict[str, Any]:
    """What lies beside the weights in a checkpoint of any engine. The weights are mapped at most, and not read."""
    if path.suffix == ".safetensors":
        metadata = WeightsFile(path).metadata
        step = metadata.get("step", metadata.get("global_step", ""))
        return {**metadata, "global_step": int(step)} if step.isdigit() else dict(metadata)
    if path.is_file():
        return {name: value for name, value in _load(path, mmap=True).items() if name != "state_dict"}
    if (path / ".metadata").exists():
        return _load(path / "meta.pt")
    rest = _load(model_files(zero_folder(path))[0], mmap=True)
    return {name: value for name, value in rest.items() if name != "module"}


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _read_fsdp2(path) if (path / ".metadata").exists() else _read_zero(path)
    if path.suffix == ".safetensors":
        file = WeightsFile(path)
        return {"state_dict": {name: file.tensor(name) for name in file.names}, "metadata": file.metadata}
    checkpoint = _load(path)
    if "state_dict" not in checkpoint:
        raise ValueError("it holds no state_dict")
    return checkpoint


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    with allow_hyper_parameters():
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(content, dict):
        raise ValueError("it holds no checkpoint")
    return content


def _read_fsdp2(path: Path) -> dict[str, Any]:
    load = fsdp2_reader(path)
    state = {name: load(name, entry) for name, entry in fsdp2_entries(path).items()}
    return {**_load(path / "meta.pt"), "state_dict": {name.removeprefix(_FSDP2): state[name] for name in state}}


def fsdp2_entries(path: Path) -> dict[str, Any]:
    """The module's tensors in an FSDP2 folder, by the folder's own names, as their sizes and properties."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _fsdp2_metadata(path)
    _refuse_short_files(path, metadata.storage_data.values())
    entries = metadata.state_dict_metadata.items()
    return {name: e for name, e in entries if name.startswith(_FSDP2) and isinstance(e, TensorStorageMetadata)}


def fsdp2_reader(path: Path) -> Callable[[str, Any], Tensor]:
    """A function that reads one of `fsdp2_entries` whole."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader: Any = FileSystemReader(path)
    metadata = _fsdp2_metadata(path)
    reader.read_metadata = lambda *_, **__: metadata  # which a load would read again for every tensor

    def read(name: str, entry: Any) -> Tensor:
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads: that is meant
            load({name: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return read


def _fsdp2_metadata(path: Path) -> Any:
    """The pickled table of contents, once it is known to name nothing but torch's own descriptions."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    _, named = skim_pickle(path / ".metadata")
    if foreign := sorted(".".join(pair) for pair in named if not _describes(*pair)):
        raise CheckpointError(f"{path / '.metadata'} names `{foreign[0]}`, which no checkpoint does: do not trust it.")
    return FileSystemReader(path).read_metadata()


def _describes(module: str, name: str) -> bool:
    if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
        return name.isidentifier() and name.lstrip("_")[:1].isupper()  # classes
    known = isinstance(getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format)
    return (module, name) in _DESCRIPTIONS or (module == "torch" and known)


def _refuse_short_files(path: Path, pieces: Iterable[Any]) -> None:
    for piece in pieces:
        size = (path / piece.relative_path).stat().st_size
        if size < piece.offset + piece.length:
            raise ValueError(f"{piece.relative_path} ends at byte {size}, before {piece.offset + piece.length}")


def _read_zero(path: Path) -> dict[str, Any]:
    """The rest lies beside the module, which is mapped and not read: its weights come from the fp32 masters."""
    state = {name: found.read() for name, found in of_zero(path).items()}
    return {**load_rest(path), "state_dict": state}


def _single(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
