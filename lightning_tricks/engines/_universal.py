"""A ZeRO checkpoint of one number of ranks for a run of another, through DeepSpeed's universal checkpoint."""

import argparse
import contextlib
import importlib
import io
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from lightning_tricks.engines._consolidate import find_weights
from lightning_tricks.engines._skim import Inert
from lightning_tricks.engines._zero_files import zero_files, zero_folder
from lightning_tricks.errors import CheckpointError

__all__ = ["convert_for_other_ranks", "loads_universal", "put", "restore_the_rest"]

UNIVERSAL = "checkpoint_universal"
_MOMENTS = {"exp_avg", "exp_avg_sq"}
T = TypeVar("T")
_log = logging.getLogger(__name__)


def convert_for_other_ranks(strategy: ParallelStrategy, path: Path) -> None:
    """Write the universal form of a ZeRO checkpoint into its folder, once. Collective.

    It takes three times the model in fp32 on the disk (weights and both moments of Adam), and as long as reading the
    checkpoint and writing that twice: rank 0 does it alone.

    Args:
        strategy: of the run that will load it.
        path: the checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if it cannot be converted exactly or not be written.
    """
    failure = None
    if strategy.is_global_zero:
        try:
            _refuse_inexact(path)
            _convert(path)
        except Exception as error:  # raised below, on every rank
            failure = f"{error}" if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    failure = strategy.broadcast(failure)
    if failure is not None:
        raise CheckpointError(
            f"{path} was saved by another number of processes than this run has, and cannot be converted: {failure}."
            " Resume on as many processes as saved it, or start from its weights with `read_checkpoint`."
        )


@contextlib.contextmanager
def loads_universal(engine: Any) -> Iterator[None]:
    """Let a DeepSpeed engine load the universal form within the block."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def restore_the_rest(module: nn.Module, path: Path) -> None:
    """Read buffers and frozen parameters, which DeepSpeed leaves as they are when it loads the universal form.

    Args:
        module: the plain module; its tensors are written to.
        path: the checkpoint's folder.
    """
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    saved = find_weights(path)
    with torch.no_grad():
        for name, tensor in {**frozen, **dict(module.named_buffers())}.items():
            if (whole := saved.get(name.replace("_orig_mod.", ""))) is not None:
                put(tensor, whole.read())


def put(tensor: Any, value: Tensor) -> None:
    """Write a whole value into a tensor of the module, or into this rank's part of it. Communicates nothing."""
    if not hasattr(tensor, "ds_id"):
        tensor.copy_(value)
        return
    size = tensor.ds_tensor.numel()  # ZeRO-3: this rank's equal part, the last one padded with zeros
    start = torch.distributed.get_rank(tensor.ds_process_group) * size
    part = value.flatten()[start : start + size]
    tensor.ds_tensor.zero_()
    tensor.ds_tensor[: part.numel()].copy_(part)
    if tensor.shape == value.shape:  # kept whole beside its parts
        tensor.copy_(value)


def _refuse_inexact(path: Path) -> None:
    """What DeepSpeed's conversion would lose, or fail at."""
    stage, _, states = zero_files(path)
    base = [state["base_optimizer_state" if stage < 3 else "optimizer_state_dict"] for state in states]
    if any(isinstance(state, Inert | list) for state in base):
        raise CheckpointError("its optimizer state has a form that DeepSpeed does not convert")
    if any(0 < sum(map(bool, state["state"].values())) < len(state["param_groups"]) for state in base):
        raise CheckpointError(
            "some of its parameter groups have no moments yet, as layers that are still frozen, and DeepSpeed converts"
            " those of all or none"
        )
    kept = [set(entry) - {"step"} for state in base for entry in state["state"].values()]
    if not kept or any(names != _MOMENTS for names in kept):
        raise CheckpointError("DeepSpeed converts the state of Adam and AdamW without `amsgrad` only")
    options = [{k: v for k, v in group.items() if k != "params"} for group in base[0]["param_groups"]]
    if stage == 3 and any(group != options[0] for group in options):
        raise CheckpointError("under ZeRO-3 DeepSpeed would give all parameter groups the first one's options")


def _convert(path: Path) -> None:
    done = path / UNIVERSAL
    if not done.exists():
        started, partial = time.monotonic(), path / f".{UNIVERSAL}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        module: Any = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
        _silently(lambda: module.main(_options(zero_folder(path), partial)))
        partial.rename(done)
        size = sum(file.stat().st_size for file in done.rglob("*") if file.is_file())
        seconds = time.monotonic() - started
        _log.warning(
            "`%s` was saved by another number of processes: converted once, %.1f s and %.1f MB beside it (`%s`).",
            path,
            seconds,
            size / 1e6,
            UNIVERSAL,
        )
    (path / "latest_universal").write_text(UNIVERSAL)  # the conversion wrote the temporary name there


def _options(source: Path, target: Path) -> argparse.Namespace:
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}  # more would fork beside the threads of gloo or NCCL
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    return argparse.Namespace(input_folder=str(source), output_folder=str(target), **workers, **flags)


def _silently(work: Callable[[], T]) -> T:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()
