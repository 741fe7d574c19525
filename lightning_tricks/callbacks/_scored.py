"""What the callbacks share that act on a metric after each validation, and keep weights on a shelf."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from lightning_tricks.callbacks._base import TrickCallback, is_dry_run
from lightning_tricks.callbacks._monitor import Monitor
from lightning_tricks.callbacks._shelf import Shelf

__all__ = ["ScoredCallback"]


class ScoredCallback(TrickCallback, ABC):
    """Reads `_monitor` after each validation of a fit. Subclasses say what follows, in `_scored`."""

    _monitor: Monitor
    _monitors: Sequence[Monitor]  # all of them, `_monitor` first
    _shelf: Shelf

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was logged before, which is not this validation's."""
        if self._stage == "fit":
            for monitor in self._monitors:
                monitor.begin(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the metric, the same on every rank, and act on it; after the sanity check only see that it is there."""
        if self._stage != "fit":
            return
        if trainer.sanity_checking:
            self._monitor.check(trainer, pl_module, self.engine)
            return
        score = self._monitor.read(trainer, pl_module, self.engine)
        if score is not None and not is_dry_run(trainer):
            self._shelf.settle(self.engine)
            self._scored(trainer, score)

    @abstractmethod
    def _scored(self, trainer: Trainer, score: float) -> None:
        """Act on the metric's value. Called on all ranks, unless nothing is to be written."""
