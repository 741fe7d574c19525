"""A monitored metric: its name, its direction, and its value after a validation."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_tricks.engines import Engine, InUse, Rule, Situation
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import infer_mode

__all__ = ["NEEDS_VALIDATION", "Mode", "Monitor", "checked_mode", "joint", "votes"]

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
    """Reads one metric after each validation: what that validation logged, not what an earlier one did.

    Lightning keeps a metric until it is logged again, so a validation that leaves it out would be scored by old values.

    Args:
        trick: the callback's name, for messages.
        name: the metric's name, as validation logs it.
        mode: `"min"` or `"max"`.
    """

    def __init__(self, trick: str, name: str, mode: Literal["min", "max"]) -> None:
        self.trick = trick
        self.name = name
        self.mode = mode
        self._before: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Begin a new fit: the metric has not been seen."""
        self._known = False
        self._times = self._passed_over = 0
        self._last_step: int | None = None

    def begin(self, trainer: Trainer) -> None:
        """Note what was logged before; call it in `on_validation_start`."""
        self._before = dict(trainer.callback_metrics)

    def logged(self, trainer: Trainer) -> dict[str, Any]:
        """What this validation has logged, by name: Lightning stores each value as a new object."""
        return {name: each for name, each in trainer.callback_metrics.items() if self._before.get(name) is not each}

    def check(self, trainer: Trainer, pl_module: LightningModule, engine: Engine) -> None:
        """Refuse a metric that was never logged, if this validation or sanity check logged others. Collective.

        Raises:
            MisconfigurationError: on every rank; the message names what was logged.
        """
        logged = self.logged(trainer)
        found = set(votes(float(self.name in logged) if logged else None, pl_module, engine))
        self._known |= 1.0 in found
        per_loader = trainer.sanity_checking and "/dataloader_idx_" in self.name  # which Lightning does not show there
        if 0.0 in found and not self._known and not per_loader:
            raise self._missing(logged)

    def read(self, trainer: Trainer, pl_module: LightningModule, engine: Engine) -> float | None:
        """The mean over ranks of what this validation logged, so that all ranks decide alike. Collective.

        Returns:
            None, after a warning the first time, if this validation did not log it and an earlier one did.

        Raises:
            MisconfigurationError: on every rank, if no validation so far logged it, or this one on some ranks only.
        """
        logged = self.logged(trainer)
        value = joint(self.name, float(logged[self.name]) if self.name in logged else None, pl_module, engine)
        if value is not None:
            self._known, self._last_step, self._times = True, trainer.global_step, self._times + 1
        elif not self._known:
            raise self._missing(logged)
        else:
            self._pass_over(trainer)
        return value

    def gaps(self) -> str:
        """For the end of a fit: how many validations did not log it, and when it was last seen; empty if all did."""
        if not self._passed_over:
            return ""
        total = self._times + self._passed_over
        return f"; `{self.name}` was logged by {self._times} of {total} validations, {self._last_seen()}"

    def capture(self) -> dict[str, Any]:
        """In plain types."""
        return {"seen": [self._known, self._times, self._passed_over], "last_step": self._last_step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._known, self._times, self._passed_over = state["seen"]
        self._last_step = state["last_step"]

    def _pass_over(self, trainer: Trainer) -> None:
        self._passed_over += 1
        if self._passed_over == 1:
            rank_zero_warn(
                f"{self.trick} monitors `{self.name}`, which the validation at step {trainer.global_step} did not log;"
                f" it was {self._last_seen()}. Validations without it are passed over, as if they had not been."
            )

    def _last_seen(self) -> str:
        return "seen in the sanity check only" if self._last_step is None else f"last seen at step {self._last_step}"

    def _missing(self, logged: Collection[str]) -> MisconfigurationError:
        names = ", ".join(f"`{name}`" for name in sorted(logged)) or "nothing"
        return MisconfigurationError(
            f"{self.trick} monitors `{self.name}`, which validation does not log. It logs: {names}. Pass one of "
            f"these as `monitor`, or call `self.log({self.name!r}, ...)` in `validation_step`, from the first"
            " validation on: only later ones may leave it out."
        )


def joint(name: str, score: float | None, pl_module: LightningModule, engine: Engine) -> float | None:
    """The mean of a metric over ranks, the same on each; None if no rank has it. Collective.

    Raises:
        MisconfigurationError: on every rank, if only some have it.
    """
    found = votes(score, pl_module, engine)
    scores = [each for each in found if each is not None]
    if scores and len(scores) < len(found):
        without = [rank for rank, each in enumerate(found) if each is None]
        raise MisconfigurationError(
            f"`{name}` was logged on {len(scores)} of {len(found)} ranks, not on {without}, and all ranks decide by"
            " their mean: call `self.log` on every rank, without `rank_zero_only`."
        )
    return sum(scores) / len(scores) if scores else None


def votes(value: float | None, pl_module: LightningModule, engine: Engine) -> list[float | None]:
    """The number of each rank, None where it has none; the same list on each. Collective, also for who has none."""
    if engine.world_size == 1:
        return [value]
    table = torch.zeros(engine.world_size, 2, dtype=torch.float64, device=pl_module.device)
    if value is not None:
        table[engine.rank] = torch.tensor([1.0, value], dtype=torch.float64)
    return [number if given else None for given, number in engine.sum_over_ranks(table).tolist()]


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
