"""Drop optimizer steps whose loss or gradient is not finite, on all ranks, as if their batches had not been."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks._base import TrickCallback, is_dry_run, writable_folder
from lightning_tricks.callbacks._batch_file import write_batches
from lightning_tricks.callbacks._window import Statistics, Window, where
from lightning_tricks.engines import HeldSchedules, InUse, Rule, Situation, Trick
from lightning_tricks.errors import CheckpointError, MisconfigurationError, NonFiniteError

__all__ = ["NonFiniteGuard"]

log = logging.getLogger(__name__)


def _steps_by_hand(now: Situation, _: InUse) -> Mapping[str, object] | None:
    return {} if not now.module.automatic_optimization else None


def _skips_steps_of_schedules(now: Situation, _: InUse) -> Mapping[str, object] | None:
    configs = now.trainer.lr_scheduler_configs if now.fitting else []
    rare = [config.frequency for config in configs if config.interval == "step" and config.frequency > 1]
    return {"frequency": rare[0]} if rare else None


class NonFiniteGuard(TrickCallback):
    """Drops each optimizer step whose loss or gradient is not finite, on all ranks, with its accumulation window.

    Weights, moments, step counts and learning-rate schedules stay as they were, and so do the running statistics of
    normalisations; the next window starts clean. Each step logs `skipped_steps`, the number dropped so far. A loss that
    is not finite on one rank counts on all, and so does one whose gradient is finite or zero.

    Under fp16 a gradient that overflows is the loss scaler's own affair: it drops the step and scales less, and that is
    not counted here, but the schedules wait as well. A loss that is not finite counts under fp16 too.

    Args:
        max_skips: how many steps in a row may be dropped, 0 or more; one more ends the fit. 3 to 20 is usual.
        dirpath: a folder for the batches of dropped steps, one file for each step and rank
            (`skipped-epoch=0-batch=7-rank=1.pt`, for `torch.load`); None: they are not kept.

    Raises:
        MisconfigurationError: if `max_skips` is not a whole number of at least 0, or the folder cannot be written.
        NonFiniteError: in a fit, on every rank, when more than `max_skips` steps in a row would have to be dropped; it
            names their epochs and batches, and the ranks whose loss was not finite.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import NonFiniteGuard
        >>> guard = NonFiniteGuard(max_skips=3)
        >>> trainer = Trainer(callbacks=[guard], accelerator="cpu", logger=False)
        >>> guard.skipped_steps
        0

    References:
        Micikevicius et al.: Mixed Precision Training (ICLR 2018), whose loss scaling drops steps in the same way.
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("drop steps",),
        needs=("gradient_norm", "veto_step"),
        rules=(
            Rule(
                when=_steps_by_hand,
                verdict="degraded",
                words="under manual optimisation the module steps its schedules, after dropped steps too, and a loss"
                " that is not finite drops every step of its batch, whichever optimizer's",
                remedy="step them only where `engine_of(self.trainer).was_step_applied()`",
            ),
            Rule(
                when=_skips_steps_of_schedules,
                verdict="degraded",
                words="Lightning counts batches for a schedule with `frequency={frequency}`, dropped ones too",
                remedy="let the schedule itself wait, and use `frequency=1`",
                known="built",
            ),
        ),
    )
    place: ClassVar[int | None] = 0

    def __init__(self, *, max_skips: int = 5, dirpath: str | Path | None = None) -> None:
        super().__init__()
        if isinstance(max_skips, bool) or not isinstance(max_skips, int) or max_skips < 0:
            raise MisconfigurationError(
                f"`max_skips` must be a whole number of at least 0, got {max_skips!r}. 0 ends the fit at the first step"
                " that is not finite."
            )
        self.max_skips = max_skips
        self.dirpath = dirpath
        self.skipped_steps = 0
        self._in_a_row: list[str] = []
        self._folder: Path | None = None
        self._held = HeldSchedules()
        self._window = Window()
        self._statistics = Statistics()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note what belongs to the window."""
        self._held.release()
        if not self._window.indices:
            self._statistics.keep(pl_module)
        self._window.add(trainer.current_epoch, batch_idx, batch if self._folder else None)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note on the device whether the loss is finite."""
        self._window.see(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the step on all ranks if need be: the one place where the device is waited for."""
        if not self.engine.is_optimizer_step():
            return
        self._window.stepped = True
        ranks, gradient_is_bad = self._agree(self.engine.gradient_norm(optimizer))
        if ranks or gradient_is_bad:
            self._held.hold(trainer)
            self._statistics.put_back()
        if ranks or (gradient_is_bad and not self.engine.scales_loss()):
            self._skip(optimizer, ranks)
        elif not gradient_is_bad:
            self._in_a_row = []
        pl_module.log("skipped_steps", float(self.skipped_steps), on_step=True, on_epoch=False)
        if len(self._in_a_row) > self.max_skips:
            raise self._error()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start a new window after a step."""
        if self._window.stepped:
            self._window = Window()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedules by epoch and plateau follow: those go on."""
        self._held.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the schedules as they were found."""
        self._held.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of batches and statistics."""
        self._held.release()
        self._window = Window()
        self._statistics = Statistics()

    def _agree(self, norm: Tensor) -> tuple[list[int], bool]:
        """The ranks whose loss is not finite, and whether the gradient is not: the same on every rank."""
        flags = torch.zeros(self.engine.world_size + 1, device=norm.device)
        if self._window.bad is not None:
            flags[self.engine.rank] = self._window.bad.to(flags)
        flags = self.engine.sum_over_ranks(flags)
        flags[-1] = (~norm.isfinite()).to(flags)
        *losses, gradient = flags.tolist()
        return [rank for rank, bad in enumerate(losses) if bad], bool(gradient)

    def _skip(self, optimizer: Optimizer, ranks: list[int]) -> None:
        self.engine.veto_step(optimizer)
        self.skipped_steps += 1
        self._in_a_row.append(where(self._window, ranks))
        if self.engine.rank == 0:
            log.warning("NonFiniteGuard: dropped a step, %s.", self._in_a_row[-1])
        if self._folder is not None:
            self._dump(self._folder, ranks)

    def _dump(self, folder: Path, ranks: list[int]) -> None:
        """This rank's share. No other rank waits for it, so a full disk costs the file and not the fit."""
        window, rank = self._window, self.engine.rank
        facts = {"epoch": window.epoch, "batch_indices": list(window.indices), "rank": rank, "ranks": ranks}
        path = folder / f"skipped-epoch={window.epoch}-batch={window.indices[0]}-rank={rank}.pt"
        try:
            write_batches(path, window.batches, facts)
        except CheckpointError as error:
            log.warning("NonFiniteGuard: rank %d could not keep the batches of a dropped step: %s", rank, error)

    def _error(self) -> NonFiniteError:
        found = "; ".join(self._in_a_row)
        return NonFiniteError(
            f"{len(self._in_a_row)} steps in a row are not finite, more than `max_skips={self.max_skips}` allows:"
            f" {found}. Look at these batches (`dirpath=...` keeps them), lower the learning rate, or clip gradients."
        )

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        keeps = self.dirpath is not None and not is_dry_run(trainer)
        self._folder = writable_folder("NonFiniteGuard", self.dirpath) if keeps and self.dirpath is not None else None

    def _capture(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps, "in_a_row": list(self._in_a_row)}

    def _restore(self, state: dict[str, Any]) -> None:
        self.skipped_steps = state["skipped_steps"]
        self._in_a_row = list(state["in_a_row"])
