"""Stop when a validation metric no longer improves, and hand back the best weights."""

import logging
import math
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_tricks.callbacks._base import is_dry_run, writable_folder
from lightning_tricks.callbacks._monitor import NEEDS_VALIDATION, Mode, Monitor, checked_mode
from lightning_tricks.callbacks._scored import ScoredCallback
from lightning_tricks.callbacks._shelf import Shelf
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import is_improvement

__all__ = ["EarlyStopping"]

log = logging.getLogger(__name__)


class EarlyStopping(ScoredCallback):
    """Stops a fit once a metric has not improved for `patience` validations, and puts the best weights back.

    The best weights are back in the module after `fit`, whatever ended it: this callback, `max_epochs` or another.
    Only a fit that fails or is interrupted keeps its last weights; the best ones are then in `best_path`. All ranks
    decide together, by the mean of their values. Before `Trainer(min_epochs, min_steps)` nothing is stopped, and an
    improvement until then lets training go on. A resumed fit keeps the best score and the count, and takes the
    patience that it is given. A value that is not finite is never the best.

    Args:
        monitor: metric to watch, as `validation_step` logs it.
        mode: `min` if lower is better, `max` if higher is, `auto` to tell it from the metric's name.
        patience: validations without an improvement before stopping, 1 or more; 2 to 10 is usual.
        min_delta: smallest change that counts as an improvement, in the metric's unit, 0 or more.
        restore_best: whether to put the best weights back after the fit; if not, none are saved either.
        dirpath: folder for the best weights, seen by all nodes; `<default_root_dir>/early_stopping` if null.

    Attributes:
        best_score: the best value of the metric; None before the first.
        best_step: the optimizer step it was reached at.
        best_path: the file of the best weights; None if there is none.
        wait_count: validations since then.
        stopped_reason: why this callback stopped the fit; None if it did not.

    Raises:
        MisconfigurationError: for an option out of range, a metric that validation does not log, or a folder that
            cannot be written.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import EarlyStopping
        >>> stopping = EarlyStopping("val/macro_f1", patience=5)
        >>> stopping.mode
        'max'
        >>> trainer = Trainer(callbacks=[stopping], max_epochs=100, accelerator="cpu", logger=False)

    References:
        Prechelt: Early stopping - but when? (Neural Networks: Tricks of the Trade, 1998).
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("stop early",), needs=("load_weights", "save_weights"), rules=(NEEDS_VALIDATION,)
    )
    place: ClassVar[int | None] = 4  # what it restores is not to be averaged over

    best_score: float | None
    best_step: int | None
    stopped_reason: str | None
    _best_file: str | None

    def __init__(
        self,
        monitor: str = "val/loss",
        *,
        mode: Mode = "auto",
        patience: int = 3,
        min_delta: float = 0.0,
        restore_best: bool = True,
        dirpath: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.mode = checked_mode("EarlyStopping", monitor, mode)
        self.monitor = monitor
        self.patience = _checked_patience(patience)
        self.min_delta = _checked_min_delta(min_delta)
        self.restore_best = restore_best
        self.dirpath = dirpath
        self._monitor = Monitor("EarlyStopping", monitor, self.mode)
        self._reset()

    @property
    def best_path(self) -> Path | None:
        """The file of the best weights; None if there is none."""
        return None if self._best_file is None else self._shelf.path(self._best_file)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the files of a resumed run, and stop at once if it had already run out of patience."""
        self._resumed = False
        if self.restore_best and not is_dry_run(trainer):
            self._find_files()
        self._stop_if_due(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the patience was exhausted before, and `min_epochs` is reached only now."""
        self._stop_if_due(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back."""
        self._shelf.settle(self.engine)
        self._finish(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back if a resumed fit found nothing left to train, so that training never began."""
        if self._resumed and self.restore_best and not is_dry_run(trainer):
            self._find_files()
            self._finish(trainer)

    def _identity(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._reset()
        if self.restore_best and not is_dry_run(trainer):
            folder = self.dirpath or Path(trainer.default_root_dir) / "early_stopping"
            self._shelf.open(writable_folder("EarlyStopping", folder))

    def _capture(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "best_file": self._best_file,
            "shelf": self._shelf.capture(self._files()),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._resumed = True
        self.wait_count = state["wait_count"]
        self.best_score = state["best_score"]
        self.best_step = state["best_step"]
        if self.restore_best:
            self._best_file = state["best_file"]
            self._shelf.restore(state["shelf"])

    def _reset(self) -> None:
        self.best_score = self.best_step = self.stopped_reason = self._best_file = None
        self.wait_count = 0
        self._resumed = False
        self._shelf = Shelf()

    def _files(self) -> list[str]:
        return [] if self._best_file is None else [self._best_file]

    def _finish(self, trainer: Trainer) -> None:
        if self.best_path is not None:
            self.engine.load_weights(self.best_path)
        if trainer.is_global_zero:
            log.info(self._summary())

    def _find_files(self) -> None:
        gone = self._shelf.start(self._files(), self.engine)
        if gone or (self.best_score is not None and self._best_file is None):
            rank_zero_warn(
                f"EarlyStopping: the weights of the best score, {self.best_score}, are not in {self._shelf.path('')}, "
                "so the next validation counts as the best so far. To keep the best, resume with the `dirpath` of the "
                "run that wrote it."
            )
            self.best_score = self.best_step = self._best_file = None

    def _scored(self, trainer: Trainer, score: float) -> None:
        """Keep the weights or count, and stop when the patience is exhausted."""
        if is_improvement(score, self.best_score, mode=self.mode, min_delta=self.min_delta):
            self._keep(trainer, score)
        else:
            self.wait_count += 1
        self._stop_if_due(trainer, trainer.current_epoch)

    def _keep(self, trainer: Trainer, score: float) -> None:
        self.best_score, self.best_step, self.wait_count = score, trainer.global_step, 0
        if self.restore_best:
            previous = self._files()
            self._best_file = self._shelf.new_name("best", trainer.global_step)
            metadata = {"step": str(trainer.global_step), "monitor": self.monitor, "score": repr(score)}
            self.engine.save_weights(self._shelf.path(self._best_file), metadata)
            self._shelf.evict(previous, self.engine)

    def _stop_if_due(self, trainer: Trainer, epochs_done: int) -> None:
        enough = epochs_done >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        if self.wait_count >= self.patience and enough:
            trainer.should_stop = True
            self.stopped_reason = f"`{self.monitor}` did not improve for {self.wait_count} validations"

    def _summary(self) -> str:
        ended = f"stopped, as {self.stopped_reason}" if self.stopped_reason else "did not stop the fit"
        best = (
            f"; best `{self.monitor}` {self.best_score} at step {self.best_step}" if self.best_step is not None else ""
        )
        return f"EarlyStopping {ended}{best}{'; its weights are restored' if self._best_file else ''}."


def _checked_patience(patience: int) -> int:
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise MisconfigurationError(
            f"EarlyStopping's `patience` must be a whole number of validations, 1 or more, got {patience!r}. To stop "
            "at the first validation without an improvement, pass patience=1."
        )
    return patience


def _checked_min_delta(min_delta: float) -> float:
    if not math.isfinite(min_delta) or min_delta < 0:
        raise MisconfigurationError(
            f"EarlyStopping's `min_delta` must be a finite number, 0 or more, got {min_delta!r}. The direction comes "
            "from `mode`, not from its sign."
        )
    return float(min_delta)
