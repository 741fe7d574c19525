"""Checkpoints of every engine, as jobs that a `Group` runs on every rank."""

from pathlib import Path

import torch
from torch import nn

from tests.engines.checks import Adapted, Net, Probe, Run, fit
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
