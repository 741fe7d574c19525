"""The recipe by a token budget: on ranks and in windows, and the same texts as one batch for each step."""

import logging
import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tricks.data import TricksDataLoader
from lightning_tricks.data._plan import Plan
from lightning_tricks.errors import DataError
from lightning_tricks.recipes import TextClassificationData, TextClassifier
from tests.trainers import quiet_trainer

BUDGET = 40


def prepare() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


class Merged:
    """On one device: each step the samples that `world` ranks have in a window of `window` batches."""

    def __init__(self, sampler: Any, world: int, window: int) -> None:
        self._sampler, self._world, self._window = sampler, world, window

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def steps(self, world: int, limit: int) -> int:
        return -(-self._sampler.steps(self._world, limit) // self._window)

    def plan(self, world: int, limit: int, *rest: Any) -> Plan:
        plan = self._sampler.plan(self._world, limit)
        firsts = range(0, len(plan), self._window)
        windows = [range(first, min(first + self._window, len(plan))) for first in firsts]
        steps = [[plan.part(i, rank, self._world) for i in each for rank in range(self._world)] for each in windows]
        sizes = np.array([sum(map(len, step)) for step in steps])
        stops = np.cumsum(sizes)
        return Plan(np.concatenate([part for step in steps for part in step]), stops - sizes, stops)


class Texts(TextClassificationData):
    """The recipe's, whose steps can be those of other ranks and windows."""

    merged: tuple[int, int] | None = None

    def train_dataloader(self) -> TricksDataLoader:
        loader = super().train_dataloader()
        if self.merged is None:
            return loader
        order = Merged(loader.order, *self.merged)
        return TricksDataLoader(loader.dataset, sampler=order, collate_fn=loader.collate_fn)


class Seen(TextClassifier):
    """The recipe's, without dropout; tells how many texts each batch held."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.dropout.p = 0.0
        self.sizes: list[int] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.sizes.append(len(batch["labels"]))


class Torchs(Seen):
    """With torch's weighted mean of what one batch holds."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"], weight=self.class_weights)


def fit(
    path: str, encoder: str, folder: str, *, window: int = 1, merged: list[int] | None = None, torchs: bool = False
) -> dict[str, Any]:
    """Two epochs on as many ranks as there are processes.

    Args:
        path: of the texts.
        encoder: without dropout.
        folder: where the tokens are kept, and rank 0 leaves `weights.pt`.
        window: batches to a step.
        merged: ranks and window whose batches one device takes together.
        torchs: whether the loss is torch's.

    Returns:
        The texts of each batch on this rank, and the number of steps.
    """
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    data = Texts(path, text="remark", label="mood", max_length=16, max_tokens=BUDGET)
    data.merged = None if merged is None else (merged[0], merged[1])
    torch.manual_seed(1)
    module = (Torchs if torchs else Seen)(data.labels, class_counts=data.class_counts, name=encoder)
    options = {"devices": world, "strategy": "ddp" if world > 1 else "auto", "accumulate_grad_batches": window}
    trainer = quiet_trainer(folder, max_epochs=2, limit_val_batches=0, **options)
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        trained = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
        torch.save(trained, f"{folder}/weights.pt")
    return {"sizes": module.sizes, "steps": trainer.global_step}


def fit_own_files(paths: list[str], encoder: str, folder: str) -> str:
    """Start a fit in which each rank has a file of its own; why it was refused."""
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    path = paths[int(os.environ["RANK"])]
    data = Texts(path, text="remark", label="mood", max_length=16, max_tokens=BUDGET)
    trainer = quiet_trainer(folder, max_epochs=1, devices=len(paths), strategy="ddp")
    try:
        trainer.fit(Seen(data.labels, class_counts=data.class_counts, name=encoder), datamodule=data)
    except DataError as error:
        return str(error)
    return ""
