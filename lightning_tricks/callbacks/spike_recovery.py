"""Go back to a good state when the loss spikes, and leave out the batches that led there."""

import copy
import logging
import math
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.engines import Snapshot, Trick
from lightning_tricks.errors import DivergenceError, MisconfigurationError
from lightning_tricks.functional import robust_zscore

__all__ = ["SpikeRecovery"]

log = logging.getLogger(__name__)


class _Good(NamedTuple):
    """A state to go back to."""

    step: int
    engine: Snapshot
    schedules: list[dict[str, Any]]
    losses: list[float]


class SpikeRecovery(TrickCallback):
    """Rolls training back when its loss spikes, and goes on with the batches after the spike, on all ranks.

    The loss of each optimizer step, its mean over the window and the ranks, is held against the `window` losses before
    it: one whose robust z-score is above `threshold`, or that is not finite, is a spike. Weights, moments, step counts,
    schedules and buffers then become those of the last but one state kept, at least `every_n_steps` before, as if the
    batches since had not been. States are kept in memory. Each step logs `rollbacks`, their number so far.

    Args:
        threshold: the robust z-score (from median and median absolute deviation) above which a loss is a spike, above
            0; 6 to 20 is usual.
        window: the number of losses to go by, 8 or more; before there are as many, nothing is a spike.
        every_n_steps: optimizer steps from one state kept to the next, 1 or more; 100 to 1000 is usual.
        max_attempts: rollbacks without `window` good steps between them, 1 or more; one more ends the fit.

    Raises:
        MisconfigurationError: if an option is out of its range.
        DivergenceError: in a fit, on every rank, when there would be more than `max_attempts` rollbacks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import SpikeRecovery
        >>> recovery = SpikeRecovery(threshold=8.0, every_n_steps=200)
        >>> trainer = Trainer(callbacks=[recovery], accelerator="cpu", logger=False)
        >>> recovery.rollbacks
        0

    References:
        Chowdhery et al.: PaLM: Scaling Language Modeling with Pathways (JMLR 2023), section 5.1, arXiv:2204.02311.
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("recover from spikes",), needs=("capture_state", "restore_state", "unscaled_loss")
    )

    def __init__(
        self, *, threshold: float = 8.0, window: int = 100, every_n_steps: int = 100, max_attempts: int = 3
    ) -> None:
        super().__init__()
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < math.inf:
            raise MisconfigurationError(f"`threshold` must be a finite number above 0, got {threshold!r}: 8 is usual.")
        self.threshold = float(threshold)
        self.window = _at_least("window", window, 8)
        self.every_n_steps = _at_least("every_n_steps", every_n_steps, 1)
        self.max_attempts = _at_least("max_attempts", max_attempts, 1)
        self.rollbacks = 0
        self._attempts: list[int] = []
        self._since = 0  # good steps since the last rollback
        self._losses: list[float] = []
        self._loss: list[Tensor] = []
        self._kept: list[_Good] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state that the fit begins with, or goes on from."""
        self._keep_this_alone(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What a checkpoint holds is what a resumed fit could go back to: this one keeps the same."""
        if self._kept:
            self._keep_this_alone(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss on the device, as the module returned it: Lightning has divided and scaled this one."""
        whole = self.engine.unscaled_loss(loss.detach().float()).mean() * trainer.accumulate_grad_batches
        self._loss.append(whole)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the step's loss, which all ranks have to know: the one place where the device is waited for."""
        if trainer.global_step == self._step or not self._loss:
            return
        self._step, losses = trainer.global_step, torch.stack(self._loss)
        self._loss = []
        if self.engine.was_step_applied():
            loss = float(self.engine.sum_over_ranks(losses.mean())) / self.engine.world_size
            if self._is_spike(loss):
                self._go_back(trainer, loss)
            else:
                self._go_on(trainer, loss)
        pl_module.log("rollbacks", float(self.rollbacks), on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the states."""
        self._kept, self._loss = [], []

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        full = len(self._losses) == self.window
        losses = torch.tensor(self._losses, dtype=torch.float64)
        return full and float(robust_zscore(losses, torch.tensor(loss, dtype=torch.float64))) > self.threshold

    def _go_on(self, trainer: Trainer, loss: float) -> None:
        self._losses = [*self._losses, loss][-self.window :]
        self._since += 1
        if self._since >= self.window:
            self._attempts = []
        if trainer.global_step % self.every_n_steps == 0:  # not so many after the last: a resumed fit keeps the same
            self._kept = [*self._kept, self._state(trainer)][-2:]

    def _go_back(self, trainer: Trainer, loss: float) -> None:
        self._attempts.append(trainer.global_step)
        if len(self._attempts) > self.max_attempts:
            raise DivergenceError(
                f"the loss spiked at the steps {', '.join(map(str, self._attempts))}, to {loss:.4g} at last, more often"
                f" than `max_attempts={self.max_attempts}` allows. Lower the learning rate, clip gradients, or look at"
                " the batches."
            )
        good = self._kept[0]
        self.engine.restore_state(good.engine)
        for config, state in zip(trainer.lr_scheduler_configs, good.schedules, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        self._losses, self._kept = list(good.losses), [good]
        self._since = 0
        self.rollbacks += 1
        if self.engine.rank == 0:
            log.warning(
                "SpikeRecovery: the loss spiked to %.4g at step %d: back to the state of step %d, past the batches"
                " since.",
                loss,
                trainer.global_step,
                good.step,
            )

    def _keep_this_alone(self, trainer: Trainer) -> None:
        self._kept, self._step = [self._state(trainer)], trainer.global_step

    def _state(self, trainer: Trainer) -> _Good:
        schedules = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        return _Good(trainer.global_step, self.engine.capture_state(), schedules, list(self._losses))

    def _capture(self) -> dict[str, Any]:
        facts = {"rollbacks": self.rollbacks, "since": self._since}
        return {**facts, "attempts": list(self._attempts), "losses": list(self._losses)}

    def _restore(self, state: dict[str, Any]) -> None:
        self.rollbacks, self._since = state["rollbacks"], state["since"]
        self._attempts, self._losses = list(state["attempts"]), list(state["losses"])


def _at_least(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise MisconfigurationError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    return value
