"""What can be refused before training starts: an unknown strategy, too many devices, a folder or file of no use."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_tricks.cli.names import nearest
from lightning_tricks.errors import CheckpointError, MisconfigurationError

__all__ = ["check_checkpoint", "check_devices", "check_folder", "check_strategy"]


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy's name that is not registered.

    Args:
        strategy: `trainer.strategy` as parsed: a name, or an object's configuration, which is left alone.

    Raises:
        MisconfigurationError: with the nearest names.

    Example:
        >>> check_strategy("zero_2")
        >>> check_strategy("zro_2")
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.MisconfigurationError: `zro_2` is not a strategy. Did you mean `zero_2` or `zero_3`?
    """
    # The registry as the Trainer sees it, with Lightning's names and ours.
    from lightning.pytorch.trainer.connectors.accelerator_connector import StrategyRegistry  # type: ignore[attr-defined]

    from lightning_tricks.strategies import PRESETS

    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
        suggestion = nearest(strategy, known)
        if not suggestion.startswith("Did"):
            suggestion = f"The flags of this suite are {', '.join(f'`{name}`' for name in PRESETS)}."
        raise MisconfigurationError(f"`{strategy}` is not a strategy. {suggestion}")


def check_devices(accelerator: Any, devices: Any) -> None:
    """Refuse more devices, or on CPU more processes, than the machine has.

    Args:
        accelerator: `trainer.accelerator` as parsed.
        devices: `trainer.devices` as parsed: a number, a list of indexes, `auto`, -1.

    Raises:
        MisconfigurationError: with both numbers.

    Example:
        >>> check_devices("cpu", 1)
        >>> check_devices("cpu", 4096)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.MisconfigurationError: `devices=4096` asks for 4096 processes, but ... CPU core...
    """
    wanted = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus):
        if wanted > gpus:
            remedy = f"Ask for `--devices {gpus}` or fewer" if gpus else "Add `--trainer.accelerator cpu`"
            raise MisconfigurationError(
                f"`devices={devices}` asks for {_count(wanted, 'GPU')}, but this machine has {gpus}. {remedy}."
            )
    elif accelerator in ("cpu", "auto") and wanted > _cores():
        raise MisconfigurationError(
            f"`devices={devices}` asks for {wanted} processes, but this machine has {_count(_cores(), 'CPU core')} "
            f"for this program. Ask for `--devices {_cores()}` or fewer."
        )


def check_folder(folder: str | Path) -> None:
    """Refuse an output folder that cannot be written. It is made if it is not there.

    Args:
        folder: where the run writes.

    Raises:
        MisconfigurationError: with the folder and the system's reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MisconfigurationError(
            f"The output folder `{folder}` cannot be written ({error.strerror}). "
            "Choose another with `--trainer.default_root_dir FOLDER`, or `--output` for the demo."
        ) from error


def check_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint that is not there or was cut off, without reading its tensors.

    Args:
        path: a file, or the folder that a sharded strategy writes.

    Raises:
        CheckpointError: with the path and the remedy.

    Example:
        >>> check_checkpoint("runs/none.ckpt")
        Traceback (most recent call last):
        ...
        lightning_tricks.errors.CheckpointError: There is no checkpoint at `runs/none.ckpt`. ...
    """
    from lightning_tricks.cli.resume import is_complete

    if not Path(path).exists():
        raise CheckpointError(
            f"There is no checkpoint at `{path}`. Give the path of one, or `fit --resume` to find the newest."
        )
    if not is_complete(Path(path)):
        raise CheckpointError(
            f"The checkpoint `{path}` is incomplete: it was cut off while being written or copied. "
            "Use an older one, or copy it again; `fit --resume` takes the newest complete one."
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
