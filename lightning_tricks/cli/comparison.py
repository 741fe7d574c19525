"""The comparison that the demo and its benchmark run: rows, their budget, and how one is trained."""

import dataclasses
import time
from pathlib import Path
from typing import Literal, cast

from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_tricks.callbacks import CheckpointEnsemble, EarlyStopping, FixedNorm, GradientClipping, TopK
from lightning_tricks.cli.recorder import Recorder
from lightning_tricks.cli.stopwatch import Stopwatch
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.data.tokens import TokenDataset
from lightning_tricks.recipes import TextClassificationData, TextClassifier

__all__ = ["FULL", "QUICK", "ROWS", "Budget", "Result", "Row", "train"]

CLIP = 2.0
VALIDATION_SHARE = 3  # every third validation text is scored while training: enough to choose by, and quick
MONITOR = "val/macro_f1"


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every row gets.

    Args:
        steps: optimizer steps.
        validations: how often the validation split is scored meanwhile.
        batch_size: texts per step.
        max_length: tokens of a text; longer ones are cut.
        limit: texts in all, 80% of them for training; None for the whole corpus.

    Example:
        >>> Budget(steps=100, validations=4, batch_size=16, max_length=48).every
        25
    """

    steps: int
    validations: int
    batch_size: int
    max_length: int
    limit: int | None = None

    @property
    def every(self) -> int:
        """Steps between two validations."""
        return self.steps // self.validations

    @property
    def tokens(self) -> int:
        """What a step of this many of the longest texts holds: the token budget of the rows that go by it."""
        return self.batch_size * self.max_length

    def data(self, seed: int, *, by_tokens: bool = False) -> TextClassificationData:
        """The review corpus, cut to this budget.

        Args:
            seed: of the split and of the training order.
            by_tokens: whether training batches go by `tokens`, not by `batch_size`.
        """
        return _Reviews(
            batch_size=self.batch_size,
            max_length=self.max_length,
            max_tokens=self.tokens if by_tokens else None,
            limit=self.limit,
            seed=seed,
        )


class _Reviews(TextClassificationData):
    def val_dataloader(self) -> TricksDataLoader:
        loader = super().val_dataloader()
        whole = cast(TokenDataset, loader.dataset)
        part = TokenDataset(whole.texts, whole.rows[::VALIDATION_SHARE], whole.labels)
        return TricksDataLoader(
            part, batch_size=self.batch_size, shuffle=False, seed=self.seed, collate_fn=loader.collate_fn
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Args:
        name: as the table shows it.
        tuning: what is trained, as in `TextClassifier`.
        class_weighting: `balanced` or `none`.
        tricks: whether gradient clipping, checkpoint ensemble and early stopping are added.
        by_tokens: whether batches are of like length within a token budget.
    """

    name: str
    tuning: Literal["head", "lora"]
    class_weighting: Literal["balanced", "none"] = "none"
    tricks: bool = False
    by_tokens: bool = False


@dataclasses.dataclass
class Result:
    """What a row came to.

    Args:
        name: the row's.
        learning_rate: the highest one.
        metrics: on the test split: `accuracy`, `macro_f1`, `recall_<label>`, `loss`.
        seconds: of training, validations included.
        training_seconds: the same without the validations.
        cpu_seconds: of this process, in the same time.
        texts: trained on.
        steps: optimizer steps taken; early stopping may take fewer.
        trainable: parameters.
        checkpoint_bytes: of the weights as a checkpoint.
        clip: the limit of the gradient norm; None without clipping.
        curves: all that was logged, as `(step, value)` pairs.
    """

    name: str
    learning_rate: float
    metrics: dict[str, float]
    seconds: float
    training_seconds: float
    cpu_seconds: float
    texts: int
    steps: int
    trainable: int
    checkpoint_bytes: int
    clip: float | None
    curves: dict[str, list[tuple[int, float]]]

    @property
    def texts_per_second(self) -> float:
        """Of training, without the validations."""
        return self.texts / self.training_seconds


FULL = Budget(steps=200, validations=4, batch_size=16, max_length=48)
QUICK = Budget(steps=60, validations=2, batch_size=8, max_length=32, limit=2000)
LEARNING_RATES = {"head": 3e-2, "lora": 2e-3}
ROWS = (
    Row("head only", "head"),
    Row("LoRA", "lora"),
    Row("LoRA + class weights", "lora", "balanced"),
    Row("… + clip, ensemble, stop", "lora", "balanced", tricks=True),
    Row("… + token budget", "lora", "balanced", tricks=True, by_tokens=True),
)


def train(
    row: Row, budget: Budget, data: TextClassificationData, *, seed: int, folder: Path, watch: Callback
) -> Result:
    """Train one row and score it on the test split.

    Args:
        row: which tricks.
        budget: how long.
        data: the same for every row, but for how batches are cut.
        seed: of the head's and the adapters' first values, and of dropout.
        folder: for its checkpoints.
        watch: a callback that shows the progress.
    """
    seed_everything(seed, verbose=False)
    lr = LEARNING_RATES[row.tuning]
    model = TextClassifier(
        data.labels, class_counts=data.class_counts, tuning=row.tuning, class_weighting=row.class_weighting, lr=lr
    )
    ensemble = CheckpointEnsemble(TopK(3, monitor=MONITOR), dirpath=folder / "ensemble")
    stopping = EarlyStopping(MONITOR, patience=2, dirpath=folder / "best")
    tricks: list[Callback] = [GradientClipping(FixedNorm(CLIP)), ensemble, stopping] if row.tricks else []
    recorder, stopwatch = Recorder(), Stopwatch()
    trainer = _trainer(budget, folder, recorder, [*tricks, watch, stopwatch])
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds, steps = time.perf_counter() - start, trainer.global_step
    checkpoint = ensemble.path or _saved(trainer, folder)
    trainer.test(model, datamodule=data, ckpt_path=checkpoint, verbose=False)
    return Result(
        name=row.name,
        learning_rate=lr,
        metrics={name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()},
        seconds=seconds,
        training_seconds=stopwatch.seconds,
        cpu_seconds=stopwatch.cpu_seconds,
        texts=stopwatch.texts,
        steps=steps,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        checkpoint_bytes=checkpoint.stat().st_size,
        clip=CLIP if row.tricks else None,
        curves=recorder.curves,
    )


def _trainer(budget: Budget, folder: Path, recorder: Recorder, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        devices=1,
        max_epochs=-1,
        max_steps=budget.steps,
        val_check_interval=budget.every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=recorder,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _saved(trainer: Trainer, folder: Path) -> Path:
    path = folder / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    return path
