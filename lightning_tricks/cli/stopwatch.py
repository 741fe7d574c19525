"""How long training takes, without the validations in between."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Stopwatch"]


class Stopwatch(Callback):
    """Counts the texts that are trained on, and the time that it takes.

    Attributes:
        seconds: of training, loading included, validations left out.
        cpu_seconds: of this process, in the same time.
        texts: trained on.
    """

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.texts = 0
        self._since: tuple[float, float] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._since = (time.perf_counter(), time.process_time())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Count a batch's texts."""
        self.texts += len(batch["labels"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._stop()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since[0]
            self.cpu_seconds += time.process_time() - self._since[1]
            self._since = None
