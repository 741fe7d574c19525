"""Trains the members of the three ensembles: initialisations, folds, and the epochs of one run."""

import time
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch import Callback, Trainer

from lightning_tricks.callbacks import CheckpointEnsemble, LastK, Predictions
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.data.tokens import TokenDataset
from lightning_tricks.recipes import TextClassificationData, TextClassifier


@dataclass(frozen=True)
class Budget:
    """What every fit gets: epochs over the training part of `limit` texts; and how much is scored afterwards."""

    members: int
    epochs: int
    limit: int
    max_length: int
    scored: int | None  # texts of the test part; None for all


FULL = Budget(members=5, epochs=4, limit=600, max_length=40, scored=None)
QUICK = Budget(members=2, epochs=2, limit=60, max_length=8, scored=40)
LEARNING_RATE = 2e-3


def data(budget: Budget, fold: int | None = None) -> TextClassificationData:
    """The training texts; of all folds but one, if a fold is named."""
    chosen = None if fold is None else (fold, budget.members)
    return TextClassificationData(limit=budget.limit, max_length=budget.max_length, batch_size=16, fold=chosen)


def held_out(budget: Budget) -> tuple[TricksDataLoader, TricksDataLoader]:
    """Texts to choose by, and texts to report: the even and the odd ones of the test part, which no fit has seen."""
    whole = TextClassificationData(max_length=budget.max_length, batch_size=64)
    whole.setup("test")
    loader = whole.test_dataloader()
    dataset: TokenDataset = loader.dataset
    rows = dataset.rows
    if budget.scored is not None:
        rows = rows[np.linspace(0, len(rows) - 1, budget.scored).astype(int)]

    def part(start: int) -> TricksDataLoader:
        some = TokenDataset(dataset.texts, rows[start::2], dataset.labels)
        return TricksDataLoader(some, batch_size=64, shuffle=False, seed=0, collate_fn=loader.collate_fn)

    return part(0), part(1)


def fit(
    budget: Budget, folder: Path, *, seed: int, fold: int | None = None, epochs: Callback | None = None
) -> tuple[Path, float]:
    """Train one classifier; its weights, and the seconds it took."""
    path, started = folder / "model.ckpt", time.perf_counter()
    L.seed_everything(seed, verbose=False)
    source = data(budget, fold)
    model = TextClassifier(source.labels, class_counts=source.class_counts, lr=LEARNING_RATE)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=budget.epochs if epochs is None else budget.epochs + budget.members - 1,
        limit_val_batches=0,
        callbacks=[] if epochs is None else [epochs],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=source)
    trainer.save_checkpoint(path, weights_only=True)
    return path, time.perf_counter() - started


def initialisations(budget: Budget, folder: Path) -> tuple[list[Path], float]:
    """The same model from K seeds: heads and adapters start elsewhere, and batches have the same texts."""
    fits = [fit(budget, folder / f"seed_{seed}", seed=seed) for seed in range(budget.members)]
    return [path for path, _ in fits], sum(seconds for _, seconds in fits)


def folds(budget: Budget, folder: Path) -> tuple[list[Path], float]:
    """One model for each fold of a cross-validation, all from one initialisation."""
    fits = [fit(budget, folder / f"fold_{fold}", seed=0, fold=fold) for fold in range(budget.members)]
    return [path for path, _ in fits], sum(seconds for _, seconds in fits)


def one_run(budget: Budget, folder: Path) -> tuple[list[Path], float]:
    """The last K epochs of one run, which goes on for K - 1 epochs longer than the others."""
    kept = CheckpointEnsemble(LastK(budget.members), Predictions(), dirpath=folder / "epochs")
    _, seconds = fit(budget, folder / "run", seed=0, epochs=kept)
    return kept.paths, seconds
