"""Learning-rate schedules, and optimizer steps that did not happen, after which Lightning would step them too."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["HeldSchedules", "add_schedule"]

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


class AppliedSteps(LambdaLR):
    """A schedule by optimizer steps that were really applied, however often it is stepped.

    Args:
        optimizer: torch's own.
        factor: the share of each group's learning rate, given the steps applied so far. Of that number alone.
        applied: whether the last optimizer step was applied.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], applied: Callable[[], bool]) -> None:
        self._applied: Callable[[], bool] = lambda: True  # for the step that torch's own `__init__` takes
        super().__init__(optimizer, factor)
        self._applied = applied

    def step(self, epoch: int | None = None) -> None:
        """One optimizer step more, if there was one."""
        if self._applied():
            super().step()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        state: dict[str, Any] = super().state_dict()
        return {name: value for name, value in state.items() if name != "_applied"}


def add_schedule(trainer: Trainer, factor: Callable[[int], float], applied: Callable[[], bool]) -> None:
    """Let Lightning step, save and restore a schedule of ours for its optimizer. Call it in `on_fit_start`.

    Args:
        trainer: whose optimizers have just been built.
        factor: the share of each group's learning rate, given the steps applied so far.
        applied: whether the last optimizer step was applied.
    """
    (optimizer,) = trainer.optimizers
    own: Any = optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer
    schedule = AppliedSteps(own, factor, applied)
    trainer.strategy.lr_scheduler_configs.append(LRSchedulerConfig(schedule, interval="step"))
