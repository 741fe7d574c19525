"""What both strategies need of the machine, and the folders that their checkpoints go through."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.strategies import ParallelStrategy

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.storage._atomic import partial_name, publish_folder

__all__ = ["refuse_offload", "refuse_oversubscription", "save_folder"]


def refuse_oversubscription(strategy: ParallelStrategy) -> None:
    """Refuse more CPU processes than cores. Lightning itself refuses more GPUs than there are."""
    processes, cores = len(strategy.parallel_devices or []), _cores()
    if strategy.root_device.type == "cpu" and processes > cores:
        raise MisconfigurationError(
            f"`devices={processes}` asks for {processes} processes, but this machine has {cores} CPU core"
            f"{'' if cores == 1 else 's'} for this program: ask for `devices={cores}` or fewer."
        )


def refuse_offload(value: object) -> None:
    """Refuse any value of the option but None and `"cpu"`."""
    if value not in (None, "cpu"):
        raise MisconfigurationError(f"`offload` must be 'cpu' or None, got {value!r}.")


def save_folder(strategy: ParallelStrategy, path: Path, write: Callable[[Path], None]) -> None:
    """Let all ranks `write` a checkpoint folder under a temporary name, and rename it when it is complete."""
    partial = partial_name(path)
    if strategy.is_global_zero:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    strategy.barrier()
    write(partial)
    strategy.barrier()
    if strategy.is_global_zero:
        publish_folder(partial, path)
    strategy.barrier()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
