"""Average weights as a checkpoint that Lightning reads."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer

from lightning_tricks.engines import Engine
from lightning_tricks.storage import WeightsFile
from lightning_tricks.storage._atomic import atomic_file

__all__ = ["write_ensemble"]


def write_ensemble(
    trainer: Trainer,
    engine: Engine,
    weights: Path,
    out: Path,
    members: list[dict[str, Any]],
    moment: tuple[int, int] | None = None,
) -> None:
    """Write a Lightning checkpoint of these weights: no optimizer, but hyper-parameters and the module's own state.

    The module's `on_save_checkpoint` runs on every rank, as in any checkpoint; ranks other than 0 give it tensors
    without data. Memory: the weights once, on rank 0. Collective.

    Args:
        trainer: the Trainer of the module and its data.
        engine: its engine.
        weights: the weights file to wrap.
        out: the checkpoint to write; it appears only when it is complete.
        members: what the weights are the average of.
        moment: the epoch and the optimizer step that the weights are of; None: the present ones.
    """
    epoch, step = (trainer.current_epoch, trainer.global_step) if moment is None else moment
    checkpoint: dict[str, Any] = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": _state_dict(weights, engine.rank == 0),
        **_hyper_parameters(trainer),
    }
    trainer.lightning_module.on_save_checkpoint(checkpoint)
    checkpoint.setdefault("lightning_tricks", {})["ensemble"] = members
    engine.write_on_rank_zero(out, lambda: _write(checkpoint, out))


def _write(checkpoint: dict[str, Any], out: Path) -> None:
    with atomic_file(out) as partial, partial.open("wb") as stream:
        torch.save(checkpoint, stream)


def _state_dict(weights: Path, real: bool) -> dict[str, torch.Tensor]:
    file = WeightsFile(weights)
    if real:
        return {name: file.tensor(name) for name in file.names}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in file.layout.items()}


def _hyper_parameters(trainer: Trainer) -> dict[str, Any]:
    """The hyper-parameters of the module and the data, under the keys that Lightning writes them to."""
    found: dict[str, Any] = {}
    for owner in (trainer.lightning_module, vars(trainer)["datamodule"]):
        if owner is not None and owner.hparams:
            if hasattr(owner, "_hparams_name"):
                found[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            found[owner.CHECKPOINT_HYPER_PARAMS_KEY] = dict(owner.hparams)
    return found
