"""Saving together: what one rank cannot write is an error on every rank, and the checkpoint before it stays."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor

from lightning_tricks.engines._allowed import allow_hyper_parameters
from lightning_tricks.engines._ranks import ranks
from lightning_tricks.errors import CheckpointError
from lightning_tricks.storage import write_weights
from lightning_tricks.storage._atomic import atomic_file, partial_name, publish_folder
from lightning_tricks.storage._space import disk_errors, is_disk_error, unwritable
from lightning_tricks.storage.weights_file import Layout

__all__ = [
    "AtomicCheckpointIO",
    "attempt",
    "raise_together",
    "save_folder",
    "save_safely",
    "stream_on_rank_zero",
    "write_on_rank_zero",
]


def attempt(work: Callable[[], object]) -> Exception | None:
    """What `work` raised; None if it ended well."""
    try:
        work()
    except Exception as error:  # raised by `raise_together`, once no other rank waits for this one
        return error
    return None


def raise_together(path: Path, failure: Exception | None, world: int) -> None:
    """Raise on every rank what went wrong on one of them while `path` was written. Collective.

    Args:
        path: the file, or the folder.
        failure: what went wrong on this rank, if anything.
        world: the number of ranks.
    """
    found = _first(None if failure is None else _told(path, failure, world), world)
    if failure is not None and not is_disk_error(failure):
        raise failure
    if found is not None:
        raise CheckpointError(found) from failure


def write_on_rank_zero(path: Path, write: Callable[[], object]) -> None:
    """Let rank 0 write a file or folder, while the others wait; with or without a Trainer. Collective.

    Raises:
        CheckpointError: on every rank, if rank 0 failed. What is no fault of the disk, rank 0 itself raises as it is.
    """
    rank, world = ranks()
    raise_together(path, attempt(write) if rank == 0 else None, world)


def stream_on_rank_zero(
    path: Path, layout: Layout, tensors: Iterator[tuple[str, Tensor]], metadata: dict[str, str] | None
) -> None:
    """Let rank 0 write tensors that all ranks compute together, one after the other. Collective.

    Raises:
        CheckpointError: as `write_on_rank_zero` does.
    """
    rank, world = ranks()
    failure = attempt(lambda: write_weights(path, layout, tensors, metadata)) if rank == 0 else None
    for _ in tensors:
        continue
    raise_together(path, failure, world)


def save_folder(strategy: ParallelStrategy, path: Path, write: Callable[[Path], None]) -> None:
    """Let all ranks `write` a checkpoint folder under a temporary name, and rename it when it is complete.

    Raises:
        CheckpointError: on every rank, if one could not write; nothing is left of the folder then.
    """
    partial, first, world = partial_name(path), strategy.is_global_zero, strategy.world_size
    raise_together(path, attempt(lambda: _empty(partial)) if first else None, world)
    failure = attempt(lambda: write(partial))
    try:
        raise_together(path, failure, world)
        raise_together(path, attempt(lambda: publish_folder(partial, path)) if first else None, world)
    except Exception:  # on every rank, and none is writing any more
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        strategy.barrier()
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single files that appear under their name only when they are complete and on the disk.

    Lightning's own goes through the system's temporary folder and, where that is another disk, copies from there onto
    the old file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file. An address elsewhere (`s3://...`) is left to Lightning."""
        if storage_options is not None or "://" in f"{path}":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        disk = disk_errors(Path(path), _bytes(checkpoint))
        with disk, atomic_file(Path(path)) as partial, partial.open("wb") as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a file; hyper-parameters may hold OmegaConf's containers and paths."""
        with allow_hyper_parameters():
            return super().load_checkpoint(path, *arguments, **options)


def save_safely(trainer: Trainer) -> None:
    """Let one device and DDP write their files like the suite's strategies write folders; others stay as they are.

    A user's own `CheckpointIO` stays too.

    Args:
        trainer: the Trainer, before its fit.
    """
    strategy: Strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        return
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    if isinstance(strategy, DDPStrategy):
        vars(strategy)["save_checkpoint"] = bound(_save_file, strategy)


def _save_file(strategy: DDPStrategy, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
    write = bound(type(strategy).save_checkpoint, strategy, checkpoint, filepath, storage_options)
    raise_together(Path(filepath), attempt(write), strategy.world_size)


def _told(path: Path, failure: Exception, world: int) -> str:
    writer = f" by rank {ranks()[0]}" if world > 1 else ""
    if isinstance(failure, CheckpointError):
        return str(failure)
    if not is_disk_error(failure):
        return f"{path} could not be saved{writer} ({type(failure).__name__}: {failure})."
    partial = partial_name(path)
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else None
    return str(unwritable(path, failure, written=written, writer=writer))


def _first(message: str | None, world: int) -> str | None:
    if world == 1:
        return message
    told: list[str | None] = [None] * world
    torch.distributed.all_gather_object(told, message)
    return next((text for text in told if text is not None), None)


def _empty(partial: Path) -> None:
    if partial.exists():  # what a killed run left
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _bytes(value: Any) -> int:
    """What the tensors in nested containers take."""
    if isinstance(value, Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, inner))
