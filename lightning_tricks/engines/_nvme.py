"""What swapping to NVMe needs of the machine: a folder to write to, a compiler and libaio. Asked on every rank."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_tricks.errors import MisconfigurationError, MissingDependencyError, TricksError, UnsupportedError

__all__ = ["FOLDER_VARIABLE", "no_checkpoint", "nvme_problem", "offload_target", "refuse_nvme"]

FOLDER_VARIABLE = "LIGHTNING_TRICKS_NVME"
_PROGRAM = "#include <libaio.h>\nint main(void) { io_context_t context = 0; return io_queue_init(1, &context); }\n"


def offload_target(value: Any) -> Literal["cpu"] | Path | None:
    """Where the option `offload` puts things: "cpu", a folder, or nowhere else.

    A string is a folder where it holds a path separator, so that a misspelt "cpu" stays an error. "nvme" is the folder
    that the environment variable LIGHTNING_TRICKS_NVME names.

    Example:
        >>> offload_target("/mnt/nvme").name
        'nvme'
    """
    if value == "nvme":
        if not (named := os.environ.get(FOLDER_VARIABLE)):
            raise MisconfigurationError(
                f"`offload='nvme'` needs a folder on an NVMe disk: set the environment variable {FOLDER_VARIABLE} to"
                " it, or pass the folder itself, `zero(stage=3, offload=Path('/mnt/nvme'))`."
            )
        return Path(named)
    if isinstance(value, Path) or (isinstance(value, str) and os.sep in value):
        return Path(value)
    if value in (None, "cpu"):
        return "cpu" if value == "cpu" else None
    raise MisconfigurationError(f"`offload` must be 'cpu', 'nvme', a folder on NVMe or None, got {value!r}.")


def refuse_nvme(folders: Sequence[Path], rank: int, world: int) -> None:
    """Refuse a machine that cannot swap to these folders: on all ranks, with the first rank's problem. Collective."""
    problem = next(filter(None, map(nvme_problem, folders)), None)
    found: list[TricksError | None] = [None] * world
    if world > 1:
        torch.distributed.all_gather_object(found, problem)
    else:
        found = [problem]
    for other, error in enumerate(found):
        if error is not None:
            raise error if other == rank else type(error)(f"Rank {other}: {error}")


def no_checkpoint(what: str) -> UnsupportedError:
    """The error of whatever saves or loads checkpoints: DeepSpeed's own would resume with other values, silently."""
    return UnsupportedError(
        what,
        "zero_3 that swaps to NVMe",
        "DeepSpeed's checkpoint of it brings neither step counts nor what was not swapped back",
        "pass `enable_checkpointing=False`, save with `engine_of(trainer).save_weights(path)`, or offload to the CPU",
    )


def nvme_problem(folder: Path) -> TricksError | None:
    """What this machine lacks to swap to the folder; `None` if nothing.

    Example:
        >>> print(nvme_problem(Path("/no/such/folder")))
        The folder /no/such/folder to swap to does not exist: create it on an NVMe disk, or name another.
    """
    return _folder_problem(folder) or _build_problem()


def _folder_problem(folder: Path) -> MisconfigurationError | None:
    if not folder.exists():
        trouble, remedy = "does not exist", "create it on an NVMe disk, or name another"
    elif not folder.is_dir():
        trouble, remedy = "is no folder", "name a folder on an NVMe disk"
    else:
        try:
            with tempfile.TemporaryFile(dir=folder):
                return None
        except OSError as error:
            trouble, remedy = f"cannot be written to ({error.strerror})", "let this user write there, or name another"
    return MisconfigurationError(f"The folder {folder} to swap to {trouble}: {remedy}.")


def _build_problem() -> MissingDependencyError | None:
    """Why DeepSpeed could not build its reader and writer, as it does at the first use."""
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get("async_io"):
        return None
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return MissingDependencyError(
            f"Swapping to NVMe builds a part of DeepSpeed, and there is no C++ compiler `{compiler[0]}`: apt-get"
            " install g++"
        )
    if shutil.which("ninja") is None:
        installed = importlib.util.find_spec("ninja") is not None
        remedy = f"it is beside {sys.executable}, so put that folder on PATH" if installed else "pip install ninja"
        return MissingDependencyError(
            f"Swapping to NVMe builds a part of DeepSpeed, and there is no `ninja` on PATH: {remedy}"
        )
    if torch.cuda.is_available() and _cuda_home() is None:
        return MissingDependencyError(
            "Swapping to NVMe builds a part of DeepSpeed with CUDA's headers, and there is no CUDA toolkit: apt-get"
            " install nvidia-cuda-toolkit, or set CUDA_HOME to where it is"
        )
    if not _links_libaio(compiler):
        return MissingDependencyError(
            "Swapping to NVMe needs libaio and its header, which this machine lacks: apt-get install libaio-dev"
        )
    return None


def _cuda_home() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME


def _links_libaio(compiler: Sequence[str]) -> bool:
    """Whether a program that uses libaio builds, with the flags that DeepSpeed's build would get."""
    before, after = (shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "LDFLAGS"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "uses_libaio.c")
        source.write_text(_PROGRAM)
        command = [*compiler, *before, str(source), *after, "-laio", "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
