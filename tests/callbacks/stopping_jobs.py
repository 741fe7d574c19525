"""Scores that the ranks log apart, and disks that fill up, as jobs that a `Group` runs on every rank."""

import contextlib
import math
import os
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_tricks.callbacks import CheckpointEnsemble, EarlyStopping, GreedySoup, LastK, TopK
from lightning_tricks.engines import engine_of
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from tests.engines.checks import Net, Run, loader, weights_of
from tests.engines.full_disk_jobs import full_disk
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

RANK = int(os.environ.get("RANK", 0))


class Apart(Net):
    """Each rank logs what its script holds for the validation, without synchronising; nothing for None."""

    def __init__(self, *scripts, other: bool = True) -> None:
        super().__init__(batches=2)
        self.script, self.other, self.validations = scripts[RANK], other, -1

    def on_validation_start(self):
        self.validations += 1

    def validation_step(self, batch, index):
        score = self.script[min(self.validations, len(self.script) - 1)]
        if score is not None:
            self.log("val/score", float(score))
        if self.other:
            self.log("val/other", 1.0)

    def val_dataloader(self):
        return loader(1)


class Diary(L.Callback):
    """The weights at each validation."""

    def __init__(self) -> None:
        self.weights = []

    def on_validation_end(self, trainer, *_):
        self.weights.append(weights_of(trainer))


def train(engine: str, folder: str, module: L.LightningModule, *callbacks: L.Callback, **options) -> L.Trainer:
    trainer = Run(engine, Path(folder)).trainer(*callbacks, **{"max_epochs": 8, **options})
    trainer.fit(module)
    return trainer


def stopping(**options) -> EarlyStopping:
    return EarlyStopping("val/score", **{"mode": "min", "patience": 2, **options})


def top(folder: str, k: int = 2) -> CheckpointEnsemble:
    return CheckpointEnsemble(TopK(k, monitor="val/score", mode="min"), dirpath=f"{folder}/top")


def one_decision(engine: str, folder: str) -> list:
    """By the mean: alone, rank 0 would stop after the fifth and have its best at the third, rank 1 never."""
    early, ensemble, diary = stopping(), top(folder), Diary()
    scripts = [5, 4, 1, 2, 3, 9, 9, 9], [9, 2, 7, 6, 5, 4, 3, 2]  # means: 7, 3, 4, 4, 4, ...
    trainer = train(engine, folder, Apart(*scripts), early, diary, ensemble)
    assert (trainer.current_epoch, early.best_score, early.wait_count) == (4, 3.0, 2)
    found = weights_of(trainer)
    assert all(torch.equal(value, found[name]) for name, value in diary.weights[1].items())
    return [early.stopped_reason, early.best_step, ensemble.scores]


def not_a_number_on_one(engine: str, folder: str) -> list:
    """A mean with it is none."""
    early = stopping(patience=3)
    train(engine, folder, Apart([5, 1, 4], [5, math.nan, 4]), early, max_epochs=3)
    return [early.best_score]


def passed_over(engine: str, folder: str) -> list:
    """Where no rank logs it, no rank counts."""
    early, ensemble = stopping(), top(folder, 9)
    trainer = train(engine, folder, Apart([3, None, 4, None, 5, 0], [3, None, 4, None, 5, 0]), early, ensemble)
    assert trainer.current_epoch == 5
    return [early.wait_count, ensemble.scores]


def logged_on_one(engine: str, folder: str, at: int, which: str) -> str:
    """The same error on every rank, at the first validation or a later one."""
    made = {"stopping": stopping(), "ensemble": top(folder)}[which]
    with pytest.raises(MisconfigurationError) as raised:
        train(engine, folder, Apart([1] * 9, [1] * at + [None] * 9), made)
    return str(raised.value)


def nothing_but_on_one(engine: str, folder: str) -> str:
    """In the sanity check, where rank 1 logs nothing at all, and in the validation that follows."""
    with pytest.raises(MisconfigurationError) as raised:
        train(engine, folder, Apart([1], [None], other=False), stopping(), num_sanity_val_steps=1)
    return str(raised.value)


def logged_on_none(engine: str, folder: str) -> str:
    """In the sanity check."""
    with pytest.raises(MisconfigurationError) as raised:
        train(engine, folder, Apart([None], [None]), stopping(), num_sanity_val_steps=1)
    return str(raised.value)


def scored_on_one(engine: str, folder: str) -> str:
    """While a soup scores its members, at the end."""
    soup = CheckpointEnsemble(LastK(2), GreedySoup("val/score", mode="min"), dirpath=f"{folder}/soup")
    with pytest.raises(MisconfigurationError) as raised:
        train(engine, folder, Apart([1] * 9, [1] * 2 + [None] * 9), soup, max_epochs=2)
    return str(raised.value)


class Full(L.Callback):
    """No room on the disk from a validation on."""

    def __init__(self, at: int) -> None:
        self.at, self.room = at, contextlib.ExitStack()

    def on_validation_start(self, trainer, *_):
        if trainer.current_epoch == self.at:
            self.room.enter_context(full_disk())


def best_on_a_full_disk(engine: str, folder: str) -> str:
    """The new best cannot be written: the one before it stays, and is what there is to go back to."""
    early, full, diary = stopping(), Full(at=1), Diary()
    with pytest.raises(CheckpointError) as raised, full.room:
        train(engine, folder, Apart([3, 2], [3, 2]), diary, full, early)
    [left] = (Path(folder) / "early_stopping").iterdir()
    trainer = Run(engine, Path(folder)).trainer(Loads(left, diary.weights[0]), max_epochs=1)
    trainer.fit(Apart([1], [1]))
    return str(raised.value)


class Loads(L.Callback):
    """The engine reads a file, and has its weights."""

    def __init__(self, path: Path, expected: dict) -> None:
        self.path, self.expected = path, expected

    def on_train_start(self, trainer, *_):
        engine_of(trainer).load_weights(self.path)
        found = weights_of(trainer)
        assert all(torch.equal(value, found[name]) for name, value in self.expected.items())


class FullAtTheEnd(L.Callback):
    """No room for the ensemble's file, but for the mean."""

    def __init__(self, ensemble: CheckpointEnsemble) -> None:
        self.ensemble, self.room = ensemble, contextlib.ExitStack()

    def on_train_end(self, trainer, *_):
        engine = self.ensemble.engine
        write = engine.write_on_rank_zero

        def watched(path, job):
            with full_disk() if path.name == "ensemble.ckpt" else contextlib.nullcontext():
                write(path, job)

        engine.write_on_rank_zero = watched


def ensemble_on_a_full_disk(engine: str, folder: str) -> str:
    """The file of the fit before stays as it was; the members are there."""
    train(engine, folder, Apart([3], [3]), top(folder), max_epochs=1)
    file = Path(folder) / "top" / "ensemble.ckpt"
    before, ensemble = file.read_bytes(), top(folder)
    with pytest.raises(CheckpointError) as raised:
        train(engine, folder, Apart([3, 2], [3, 2]), FullAtTheEnd(ensemble), ensemble, max_epochs=2)
    assert file.read_bytes() == before
    assert all(ensemble._shelf.path(member.file).is_file() for member in ensemble._kept)
    if RANK == 0:  # which deletes them
        assert not [path for path in file.parent.iterdir() if path.name.startswith((".", "mean", "raw"))]
    return str(raised.value)
