"""A monitored metric: its name, its direction, and its value after a validation."""

from collections.abc import Mapping
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_tricks.engines import Engine, InUse, Rule, Situation
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import infer_mode

__all__ = ["NEEDS_VALIDATION", "Mode", "Monitor", "checked_mode", "joint"]

Mode = Literal["auto", "min", "max"]


def checked_mode(trick: str, monitor: str, mode: Mode) -> Literal["min", "max"]:
    """The direction of a metric: as given, or told from its name.

    Raises:
        MisconfigurationError: if the mode is none of the three, or the name does not tell.
    """
    if mode not in ("auto", "min", "max"):
        raise MisconfigurationError(f"{trick}'s `mode` must be 'auto', 'min' or 'max', got {mode!r}.")
    if not isinstance(monitor, str) or not monitor:
        raise MisconfigurationError(f"{trick}'s `monitor` must name a logged metric, got {monitor!r}.")
    found = infer_mode(monitor) if mode == "auto" else mode
    if found is None:
        raise MisconfigurationError(
            f"{trick} cannot tell from its name whether `{monitor}` is better low or high: pass mode='min' or 'max'."
        )
    return found


class Monitor:
    """Reads one metric after each validation.

    Args:
        trick: the callback's name, for messages.
        name: the metric's name, as validation logs it.
        mode: `"min"` or `"max"`.
    """

    def __init__(self, trick: str, name: str, mode: Literal["min", "max"]) -> None:
        self.trick = trick
        self.name = name
        self.mode = mode

    def check(self, trainer: Trainer) -> None:
        """Refuse a metric that the sanity check logged nothing of, if it logged others."""
        if trainer.callback_metrics and self.name not in trainer.callback_metrics:
            raise self._missing(trainer)

    def read(self, trainer: Trainer, pl_module: LightningModule, engine: Engine) -> float:
        """The metric's value: the mean over ranks, so that all ranks decide alike. Collective.

        Raises:
            MisconfigurationError: if validation did not log it; the message names what it did.
        """
        if self.name not in trainer.callback_metrics:
            raise self._missing(trainer)
        return joint(float(trainer.callback_metrics[self.name]), pl_module, engine)

    def _missing(self, trainer: Trainer) -> MisconfigurationError:
        logged = ", ".join(f"`{name}`" for name in sorted(trainer.callback_metrics)) or "nothing"
        return MisconfigurationError(
            f"{self.trick} monitors `{self.name}`, which validation does not log. It logs: {logged}. Pass one of "
            f"these as `monitor`, or call `self.log({self.name!r}, ...)` in `validation_step`."
        )


def joint(score: float, pl_module: LightningModule, engine: Engine) -> float:
    """The mean of a number over ranks, the same on each. Collective."""
    if engine.world_size == 1:
        return score
    total = engine.sum_over_ranks(torch.tensor(score, dtype=torch.float64, device=pl_module.device))
    return float(total) / engine.world_size


def _never_validated(situation: Situation, used: InUse) -> Mapping[str, object] | str | None:
    trainer, module, data = situation.trainer, situation.module, situation.datamodule
    possible = trainer.limit_val_batches > 0 and is_overridden("validation_step", module)
    known = is_overridden("val_dataloader", module) or (data is not None and is_overridden("val_dataloader", data))
    if not possible or (situation.fitting and not trainer.enable_validation):
        return {"monitor": used.source._monitor.name}
    return None if situation.fitting or known else "it needs a validation dataloader"


NEEDS_VALIDATION = Rule(
    when=_never_validated,
    verdict="refused",
    words="{trick} monitors `{monitor}` after each validation, but this fit has none",
    remedy="give it a validation dataloader and a `validation_step`, and `limit_val_batches` above 0",
)
