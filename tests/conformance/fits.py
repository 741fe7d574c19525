"""What a worker does for one cell: an uninterrupted fit, and one that is interrupted in mid-epoch and resumed."""

import gc
import importlib
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

import lightning_tricks  # noqa: F401  registers the strategy flags
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.errors import UnsupportedError
from tests.conformance.engines import ENGINES, NODES
from tests.conformance.model import full_weights, loader

SAVED_AFTER = (1, 3)  # epoch and batch, counted from 0, after which the checkpoint is written: in mid-epoch
LOST_AFTER = 2  # batches trained after the checkpoint, which the interruption loses


def warm_up() -> None:
    """Imports, and silence about what every Trainer says."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def cell(rows: str, case: str, engine: str, precision: str, folder: str) -> dict[str, str]:
    """Do the fits of one cell; rank 0 leaves their outcomes in `folder`, `straight.pt` and `resumed.pt`.

    Args:
        rows: the module whose `CASES` hold the row.
        case: the row's name.
        engine: the column.
        precision: the Trainer's.
        folder: an empty one.

    Returns:
        `{}`, or `{"message": ..., "reason": ...}` if the engine refused the trick.
    """
    (found,) = (row for row in importlib.import_module(rows).CASES if row.name == case)
    fits = Fits(found, engine, precision, Path(folder))
    gc.freeze()  # DeepSpeed collects garbage at each fit: what was imported is none
    try:
        fits.straight()
        fits.resumed()
    except UnsupportedError as error:
        return {"message": str(error), "reason": error.reason}
    finally:
        gc.unfreeze()
    return {}


class Fits:
    """The fits of one cell, all with the same data in the same order."""

    def __init__(self, case: Any, engine: str, precision: str, folder: Path) -> None:
        self.case = case
        self.flag, self.world = ENGINES[engine]
        self.nodes = NODES.get(engine, 1)
        self.precision = precision
        self.folder = folder

    def straight(self) -> None:
        """Fit without interruption."""
        self._fit("straight", Recorder())

    def resumed(self) -> None:
        """Fit until the interruption, then build everything anew and go on from the checkpoint."""
        checkpoint = self.folder / "interrupted.ckpt"
        recorder = Recorder()
        interruption = Interruption(checkpoint, recorder)
        try:
            self._fit("resumed", recorder, interruption)
        except SimulatedDeathError:
            self._fit("resumed", Recorder(interruption.logged), checkpoint=checkpoint)
        else:
            raise RuntimeError(f"the fit ended before its interruption, {LOST_AFTER} batches after {SAVED_AFTER}")

    def _fit(self, name: str, recorder: "Recorder", *extra: L.Callback, checkpoint: Path | None = None) -> None:
        L.seed_everything(0, verbose=False)
        run = self.case.build()
        trainer = L.Trainer(
            **{"max_epochs": 3, **run.trainer},
            accelerator="cpu",
            devices=self.world // self.nodes,
            num_nodes=self.nodes,
            strategy=self.flag,
            precision=self.precision,
            callbacks=[*run.callbacks, *extra],
            logger=recorder,
            log_every_n_steps=1,
            default_root_dir=self.folder / name,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        train = (run.loader or usual)(run.samples, self.world)
        val = loader(run.validation_samples, seed=2, shuffle=False, world=self.world)
        trainer.fit(run.module, train, val, ckpt_path=checkpoint)
        weights = full_weights(trainer)
        facts = self.case.observe(run, trainer)
        if trainer.is_global_zero:
            outcome = {"weights": weights, "logged": recorder.series(), "facts": facts, "steps": trainer.global_step}
            torch.save(outcome, self.folder / f"{name}.pt")


def usual(samples: int, world: int) -> TricksDataLoader:
    """The training data of most rows."""
    return loader(samples, seed=1, world=world)


class SimulatedDeathError(Exception):
    """Stands for the end of the process: what is not in the checkpoint is lost."""


class Interruption(L.Callback):
    """Writes a checkpoint in mid-epoch, lets training go on for a while, and interrupts it."""

    def __init__(self, checkpoint: Path, recorder: "Recorder") -> None:
        self.checkpoint = checkpoint
        self.recorder = recorder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == SAVED_AFTER:
            trainer.save_checkpoint(self.checkpoint)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        epoch, saved = SAVED_AFTER
        if (trainer.current_epoch, batch_idx) == (epoch, saved + 1):
            self.logged = self.recorder.copy()  # of the steps before the checkpoint, its own included
        if (trainer.current_epoch, batch_idx) == (epoch, saved + 1 + LOST_AFTER):
            raise SimulatedDeathError


class Recorder(Logger):
    """Remembers what was logged: `{name: {step: value}}`."""

    def __init__(self, logged: dict[str, dict[int, float]] | None = None) -> None:
        super().__init__()
        self.logged = defaultdict(dict, logged or {})

    name = "recorder"
    version = 0

    @rank_zero_only
    def log_metrics(self, metrics, step=None) -> None:
        for name, value in metrics.items():
            self.logged[name][step] = float(value)

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """There is nothing to compare in them."""

    def copy(self) -> dict[str, dict[int, float]]:
        return {name: dict(values) for name, values in self.logged.items()}

    def series(self) -> dict[str, dict[str, Any]]:
        """Each name's steps, and the values at them as one tensor."""
        return {
            name: {"steps": list(values), "values": torch.tensor(list(values.values()), dtype=torch.float64)}
            for name, values in self.logged.items()
        }
