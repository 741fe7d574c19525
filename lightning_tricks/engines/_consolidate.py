"""Any engine's checkpoint as one safetensors file, a tensor at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_tricks.engines._read import explained, fsdp2_entries, fsdp2_reader
from lightning_tricks.engines._skim import skim
from lightning_tricks.engines._zero_files import Whole, entry_of, of_state_dict, of_zero
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage import WeightsFile, write_weights

__all__ = ["consolidate", "find_weights"]

_COMPILED = "_orig_mod."
_FSDP2 = "state_dict."


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
        >>> import tempfile, torch
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
        found = of_state_dict(entry_of(skim(path), "state_dict"))
    elif (path / ".metadata").exists():
        found = _of_fsdp2(path)
    else:
        found = of_zero(path)
    plain = {name.replace(_COMPILED, ""): whole for name, whole in found.items()}
    if len(plain) < len(found):
        raise CheckpointError(f"{path} holds a tensor twice, with and without `{_COMPILED}`: save it again.")
    return plain


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


# -- FSDP2 ---------------------------------------------------------------------------------------------------------


def _of_fsdp2(path: Path) -> dict[str, Whole]:
    read = fsdp2_reader(path)

    def whole(name: str, entry: Any) -> Whole:
        return Whole(entry.properties.dtype, tuple(entry.size), lambda: read(name, entry))

    return {name.removeprefix(_FSDP2): whole(name, entry) for name, entry in fsdp2_entries(path).items()}
