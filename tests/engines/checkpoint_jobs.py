"""Checkpoints of every engine, as jobs that a `Group` runs on every rank."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_tricks.engines import whole
from lightning_tricks.engines._zero_files import _flat_groups, zero_files
from lightning_tricks.errors import CheckpointError
from tests.engines.checks import Adapted, Net, Probe, Run, fit, weights_of
from tests.engines.option_jobs import prepare

__all__ = ["MODULES", "prepare", "save"]


class Tied(Net):
    """One weight under two names, two parameter groups, and a frozen layer that checkpoints keep."""

    def __init__(self) -> None:
        super().__init__(batches=2)
        self.twin = nn.Linear(6, 11, bias=False)
        self.twin.weight = self.enter.weight
        self.blocks[0].requires_grad_(False)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW([{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.0}], lr=1e-2)


MODULES = {"plain": lambda: Net(batches=2), "tied": Tied, "adapter": lambda: Adapted(batches=2)}


def save(engine: str, folder: str, module: str, precision: str = "32-true") -> None:
    run = Run(engine, Path(folder))
    fit(run, MODULES[module](), Probe(save=(2, run.path(f"{module}.ckpt"))), max_epochs=1, precision=precision)


# -- another number of ranks ---------------------------------------------------------------------------------------

STEPS, SAVED = 8, 5


class Grouped(Net):
    """Two parameter groups with options of their own, where the engine can keep them apart; frozen weights."""

    def __init__(self, groups: bool, optimizer: str = "adamw") -> None:
        super().__init__(batches=STEPS, optimizer=optimizer)
        self.groups = groups
        self.blocks[0].requires_grad_(False)

    def configure_optimizers(self):
        if not self.groups:
            return super().configure_optimizers()
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        options = [{"params": trained[:2], "weight_decay": 0.3}, {"params": trained[2:], "weight_decay": 0.0}]
        return torch.optim.AdamW(options, lr=1e-2)


def state_of(trainer, path: Path) -> dict[str, torch.Tensor]:
    """Whole weights, buffers and moments; ZeRO-1/2 give the moments in a checkpoint only, which goes to `path`."""
    state = {f"weight {name}": value for name, value in weights_of(trainer).items()}
    trained = {name: value for name, value in trainer.lightning_module.named_parameters() if value.requires_grad}
    if hasattr(next(iter(trained.values())), "_hp_mapping"):
        trainer.save_checkpoint(path)
        _, models, states = zero_files(path)
        for key in ("exp_avg", "exp_avg_sq"):
            kept = [[entry[key] for entry in rank["base_optimizer_state"]["state"].values()] for rank in states]
            found = _flat_groups(models, [{"single_partition_of_fp32_groups": groups} for groups in kept])
            state |= {f"{key} {name}": moment.read() for name, moment in found.items()}
        return state
    for name, parameter in trained.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if hasattr(parameter, "ds_id"):
                from deepspeed.utils import safe_get_full_optimizer_state

                value = safe_get_full_optimizer_state(parameter, key)
            else:
                value = whole(trainer.optimizers[0].state[parameter][key])
            state[f"{key} {name}"] = value.detach().clone()
    return state


def uninterrupted(engine: str, folder: str, groups: bool) -> None:
    """Train all steps, saving on the way; keep what they end with."""
    run = Run(engine, Path(folder))
    probe = Probe(save=(SAVED, Path(folder) / f"step{SAVED}.ckpt"))
    state = state_of(fit(run, Grouped(groups), probe, max_epochs=1, strategy=engine), Path(folder) / "end.ckpt")
    if run.rank == 0:
        torch.save(state, Path(folder) / "end.pt")


def resumed(engine: str, folder: str, groups: bool) -> float:
    """Resume on this group's ranks; how far the end is from the uninterrupted one, relative to each largest value."""
    run = Run(engine, Path(folder))
    path = Path(folder) / f"step{SAVED}.ckpt"
    module = Grouped(groups)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()  # all of it must come from the checkpoint
    trainer = fit(run, module, Probe(), ckpt_path=path, max_epochs=1, strategy=engine)
    assert trainer.global_step == STEPS
    found, expected = state_of(trainer, Path(folder) / "again.ckpt"), torch.load(Path(folder) / "end.pt")
    assert found.keys() == expected.keys()
    largest = {name: value.abs().max().clamp(min=1e-30) for name, value in expected.items()}
    return max(float((found[name].flatten() - expected[name].flatten()).abs().max() / largest[name]) for name in found)


def save_sgd(engine: str, folder: str) -> None:
    run = Run(engine, Path(folder))
    fit(run, Net(2, "sgd"), Probe(save=(1, Path(folder) / "sgd.ckpt")), max_epochs=1, strategy=engine)


def refused(engine: str, folder: str, name: str, match: str, groups: bool, optimizer: str) -> None:
    run = Run(engine, Path(folder))
    module = Grouped(groups) if optimizer == "adamw" else Net(2, "sgd")
    with pytest.raises(CheckpointError, match=match):
        fit(run, module, Probe(), ckpt_path=Path(folder) / name, max_epochs=1, strategy=engine)
