"""Learning-rate schedules that Lightning would step after an optimizer step that did not happen."""

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["HeldSchedules"]

_NEVER = 1 << 62  # Lightning steps a schedule at batches whose number is a multiple of its `frequency`


class HeldSchedules:
    """Keeps Lightning from stepping the schedules of one batch, without touching the schedules themselves.

    So nothing has to be taken back: a schedule's state, and what the module's own `lr_scheduler_step` does, are as if
    the batch had not been.
    """

    def __init__(self) -> None:
        self._frequencies: list[tuple[Any, int]] = []

    def hold(self, trainer: Trainer) -> None:
        """Until `release`, leave out schedules that Lightning steps after optimizer steps."""
        held = [config for config, _ in self._frequencies]
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not any(config is one for one in held):
                self._frequencies.append((config, config.frequency))
                config.frequency = _NEVER

    def release(self) -> None:
        """Let Lightning step them again."""
        for config, frequency in self._frequencies:
            config.frequency = frequency
        self._frequencies = []
