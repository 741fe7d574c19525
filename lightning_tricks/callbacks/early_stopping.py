"""Stop when validation metrics no longer improve, and hand back the best weights."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_tricks.callbacks._base import is_dry_run, writable_folder
from lightning_tricks.callbacks._monitor import NEEDS_VALIDATION, Mode, Monitor
from lightning_tricks.callbacks._patience import Clock, Patience, patience_of
from lightning_tricks.callbacks._scored import ScoredCallback
from lightning_tricks.callbacks._shelf import Shelf
from lightning_tricks.callbacks._stopping_plot import plot_stopping
from lightning_tricks.callbacks._watch import Tracker, Watch, watches
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError

__all__ = ["EarlyStopping"]


class EarlyStopping(ScoredCallback):
    """Stops a fit once a metric has not improved for `patience` validations, and puts the best weights back.

    The best weights are back in the module after `fit`, whatever ended it: this callback, `max_epochs`, another
    callback, or on one process Ctrl-C or a signal. A fit that fails keeps its last weights; the best ones are then in
    `best_path`. All ranks decide together, by the mean of their values. Before `Trainer(min_epochs, min_steps)` nothing
    is stopped, and an improvement until then lets training go on. A resumed fit keeps the best score and the count,
    and takes the patience that it is given. A value that is not finite is never the best. A validation that leaves the
    metric out is passed over, and a warning says when it was last seen.

    Args:
        monitor: metric to watch, as `validation_step` logs it; a `Watch` for a relative `min_delta` or a target; or a
            list of these, of which the first one's best weights are restored.
        mode: `min` if lower is better, `max` if higher is, `auto` to tell it from the metric's name; not of a `Watch`.
        patience: validations without an improvement before stopping, 1 or more; 2 to 10 is usual. Or `Epochs(3)`,
            `Steps(2000)`, `Seconds(3600)`.
        min_delta: smallest change that counts as an improvement, in the metric's unit, 0 or more; not of a `Watch`.
        smoothing: of a single named metric, as of a `Watch`: the weight of the past, in [0, 1).
        baseline: of a single named metric, as of a `Watch`: only better values start the count of patience anew.
        restore_best: whether to put the best weights back after the fit; if not, none are saved either.
        dirpath: folder for the best weights, seen by all nodes; `<default_root_dir>/early_stopping` if null.
        stop_when: of several metrics, whether `any` or `all` must have stopped improving.

    Attributes:
        best_score: the best value of the first metric, smoothed if it is; None before the first.
        best_step: the optimizer step it was reached at.
        best_path: the file of the best weights; None if there is none.
        wait_count: validations since then.
        stopped_reason: why this callback stopped the fit; None if it did not.

    Raises:
        MisconfigurationError: for an option out of range, a metric that the first validation does not log, or only some
            ranks do, or a folder that cannot be written.

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
    stopped_reason: str | None
    _best_file: str | None

    def __init__(
        self,
        monitor: str | Watch | Sequence[str | Watch] = "val/loss",
        *,
        mode: Mode = "auto",
        patience: int | Patience = 3,
        min_delta: float = 0.0,
        smoothing: float = 0.0,
        baseline: float | None = None,
        restore_best: bool = True,
        dirpath: str | Path | None = None,
        stop_when: Literal["any", "all"] = "any",
    ) -> None:
        super().__init__()
        self._watches = watches(monitor, mode=mode, min_delta=min_delta, smoothing=smoothing, baseline=baseline)
        self._patience = patience_of(patience)
        if stop_when not in ("any", "all"):
            raise MisconfigurationError(f"EarlyStopping's `stop_when` must be 'any' or 'all', got {stop_when!r}.")
        self.monitor = self._watches[0].monitor
        self.patience = patience
        self.min_delta, self.smoothing, self.baseline = min_delta, smoothing, baseline
        self.restore_best = restore_best
        self.dirpath = dirpath
        self.stop_when = stop_when
        self._reset()
        self.mode = self._trackers[0].mode
        self._monitors = [Monitor("EarlyStopping", each.watch.monitor, each.mode) for each in self._trackers]
        self._monitor = self._monitors[0]

    @property
    def best_score(self) -> float | None:
        """The best value of the first metric; None before the first."""
        return self._trackers[0].best

    @property
    def best_step(self) -> int | None:
        """The optimizer step it was reached at."""
        return self._trackers[0].best_step

    @property
    def wait_count(self) -> int:
        """Validations since the count of patience began anew."""
        return self._trackers[0].elapsed().validations

    @property
    def best_path(self) -> Path | None:
        """The file of the best weights; None if there is none."""
        return None if self._best_file is None else self._shelf.path(self._best_file)

    def plot(self, ax: Any = None, metric: int = 0) -> tuple[Any, Any]:
        """Draw a metric over the steps, smoothed if it is, with its best value and the stop.

        Args:
            ax: matplotlib axes to draw into; None: those of a new figure.
            metric: which one, of several.

        Returns:
            The figure and the axes.

        Raises:
            MissingDependencyError: without matplotlib.
        """
        return plot_stopping(self._trackers[metric], self._now.steps if self.stopped_reason else None, ax)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the files of a resumed run, and stop at once if it had already run out of patience."""
        self._resumed = False
        self._started = time.monotonic() - self._now.seconds
        if self.restore_best and not is_dry_run(trainer):
            self._find_files()
        self._stop_if_due(trainer, trainer.current_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the metrics, the same on every rank, and act on them; after the sanity check only see that they are."""
        if self._stage != "fit":
            return
        if trainer.sanity_checking:
            for monitor in self._monitors:
                monitor.check(trainer, pl_module, self.engine)
            return
        scores = [monitor.read(trainer, pl_module, self.engine) for monitor in self._monitors]
        if not is_dry_run(trainer):
            self._shelf.settle(self.engine)
            self._tick(trainer)
            for tracker, score in zip(self._trackers[1:], scores[1:], strict=True):
                if score is not None:
                    tracker.see(score, self._now)
            if scores[0] is not None:
                self._scored(trainer, scores[0])
            self._stop_if_due(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the patience was exhausted before, and `min_epochs` is reached only now."""
        self._stop_if_due(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back."""
        self._shelf.settle(self.engine)
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the best weights back after Ctrl-C or a signal, once the others have saved what they want to."""
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if stopped and self._stage == "fit" and self.best_path is not None and self.engine.world_size == 1:
            vars(trainer)["callbacks"].append(_ComesLast(self))  # which the round that is under way reaches last

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back if a resumed fit found nothing left to train, so that training never began."""
        if self._resumed and self.restore_best and not is_dry_run(trainer):
            self._find_files()
            self._finish(trainer)

    def _identity(self) -> dict[str, Any]:
        if len(self._watches) > 1:
            return {"monitor": [watch.monitor for watch in self._watches], "mode": self.mode}
        return {"monitor": self.monitor, "mode": self.mode}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._reset()
            for monitor in self._monitors:
                monitor.reset()
        if self.restore_best and not is_dry_run(trainer):
            folder = self.dirpath or Path(trainer.default_root_dir) / "early_stopping"
            self._shelf.open(writable_folder("EarlyStopping", folder))

    def _capture(self) -> dict[str, Any]:
        return {
            "now": list(self._now),
            "metrics": [tracker.state_dict() for tracker in self._trackers],
            "monitors": [monitor.capture() for monitor in self._monitors],
            "best_file": self._best_file,
            "shelf": self._shelf.capture(self._files()),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._resumed = True
        self._now = Clock(*state["now"])
        for tracker, saved in zip(self._trackers, state["metrics"], strict=True):
            tracker.load_state_dict(saved)
        for monitor, saved in zip(self._monitors, state["monitors"], strict=True):
            monitor.restore(saved)
        if self.restore_best:
            self._best_file = state["best_file"]
            self._shelf.restore(state["shelf"])

    def _reset(self) -> None:
        self._trackers = [Tracker(watch) for watch in self._watches]
        self._now = Clock()
        self._started = time.monotonic()
        self.stopped_reason = self._best_file = None
        self._resumed = False
        self._shelf = Shelf()

    def _tick(self, trainer: Trainer) -> None:
        seconds = self.engine.broadcast(time.monotonic() - self._started)
        self._now = Clock(0, trainer.current_epoch + 1, trainer.global_step, seconds)  # a tracker counts its own

    def _files(self) -> list[str]:
        return [] if self._best_file is None else [self._best_file]

    def _finish(self, trainer: Trainer) -> None:
        if self.best_path is not None:
            self.engine.load_weights(self.best_path)
        if not is_dry_run(trainer):
            self._say_how_it_ended()

    def _say_how_it_ended(self) -> None:
        rank_zero_info(self._summary())
        if self.restore_best and self.best_path is None:
            rank_zero_warn(
                f"EarlyStopping: no validation gave a finite `{self.monitor}`, so that there are no best weights to"
                " restore: the module keeps the last ones."
            )

    def _find_files(self) -> None:
        gone = self._shelf.start(self._files(), self.engine)
        if gone or (self.best_score is not None and self._best_file is None):
            rank_zero_warn(
                f"EarlyStopping: the weights of the best score, {self.best_score}, are not in {self._shelf.path('')}, "
                "so the next validation counts as the best so far. To keep the best, resume with the `dirpath` of the "
                "run that wrote it."
            )
            self._trackers[0].forget_best()
            self._best_file = None

    def _scored(self, trainer: Trainer, score: float) -> None:
        """Keep the weights if they are the best."""
        if self._trackers[0].see(score, self._now) and self.restore_best:
            previous = self._files()
            self._best_file = self._shelf.new_name("best", trainer.global_step)
            metadata = {"step": str(trainer.global_step), "monitor": self.monitor, "score": repr(score)}
            self.engine.save_weights(self._shelf.path(self._best_file), metadata)
            self._shelf.evict(previous, self.engine)

    def _stop_if_due(self, trainer: Trainer, epochs_done: int) -> None:
        enough = epochs_done >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        reason = self._reason()
        if reason is not None and enough:
            trainer.should_stop = True
            self.stopped_reason = reason

    def _reason(self) -> str | None:
        """Why to stop now; None if there is no reason to."""
        for tracker in self._trackers:
            if tracker.reached():
                return f"`{tracker.watch.monitor}` reached {tracker.watch.target}"
        spent = {each.watch.monitor: self._spent(each) for each in self._trackers}
        reasons = [f"`{name}` did not improve for {words}" for name, words in spent.items() if words is not None]
        due = len(reasons) == len(spent) if self.stop_when == "all" else bool(reasons)
        return ", and ".join(reasons) if due else None

    def _spent(self, tracker: Tracker) -> str | None:
        return None if tracker.improves else self._patience.spent(tracker.elapsed())

    def _summary(self) -> str:
        ended = f"stopped, as {self.stopped_reason}" if self.stopped_reason else "did not stop the fit"
        best = (
            f"; best `{self.monitor}` {self.best_score} at step {self.best_step}" if self.best_step is not None else ""
        )
        restored = "; its weights are restored" if self._best_file else ""
        gaps = "".join(monitor.gaps() for monitor in self._monitors)
        return f"EarlyStopping {ended}{best}{restored}{gaps}."


class _ComesLast(Callback):
    """Restores the best weights behind all other callbacks, whose checkpoints are ones to resume from; and is gone."""

    def __init__(self, stopping: EarlyStopping) -> None:
        self._stopping = stopping

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Its turn."""
        vars(trainer)["callbacks"].remove(self)
        self._stopping._finish(trainer)
