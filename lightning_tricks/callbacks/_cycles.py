"""The learning rate of cyclic members, by the optimizer steps that changed the weights."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_tricks.callbacks._member_policies import Cyclic
from lightning_tricks.engines import Engine, InUse, Rule, Situation, rival
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import cosine_restarts, cycle_ends

__all__ = ["CYCLE_JOB", "CYCLE_RULES", "Cycles"]

_NEARLY_DOWN = 0.1  # of the way: a last cycle that dropped steps have shortened counts if its rate came this far


class Cycles:
    """Counts the steps that changed the weights, and sets the rate of the next one.

    Args:
        policy: how many cycles, and how far they descend.
    """

    def __init__(self, policy: Cyclic) -> None:
        self.policy = policy
        self.applied = 0  # steps
        self._steps = 0  # that the fit will take
        self._rates: list[list[float]] = []  # the full ones, of each optimizer's groups
        self._seen = 0  # Lightning's count when a step was last looked at

    def begin(self, trainer: Trainer) -> None:
        """Note the full rates, unless a checkpoint gave them.

        Raises:
            MisconfigurationError: if the fit has no end, or fewer steps than cycles.
        """
        steps = trainer.estimated_stepping_batches
        if steps == float("inf") or steps < self.policy.cycles:
            raise MisconfigurationError(
                f"Cyclic divides the steps of a fit into {self.policy.cycles} cycles, and this one has {steps}: set"
                " `max_steps` or `max_epochs`, to more than there are cycles."
            )
        self._steps, self._seen = int(steps), trainer.global_step
        if not self._rates:
            self._rates = [[float(group["lr"]) for group in one.param_groups] for one in trainer.optimizers]

    def set_rate(self, trainer: Trainer) -> None:
        """Let the next optimizer step take its share of the full rate."""
        share = self._share(self.applied)
        for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share

    def completes(self, trainer: Trainer, engine: Engine) -> bool:
        """Count the step that ended with this batch, if one did and it was applied: does it end a cycle?"""
        if trainer.global_step == self._seen:
            return False
        self._seen = trainer.global_step
        if not engine.was_step_applied():
            return False
        self.applied += 1
        return self.applied in cycle_ends(self._steps, self.policy.cycles)

    def ends_nearly(self) -> bool:
        """Whether the fit ends in a cycle that dropped steps have cut short, its rate nearly down."""
        down = self.policy.floor + _NEARLY_DOWN * (1 - self.policy.floor)
        return (
            self.applied not in (0, *cycle_ends(self._steps, self.policy.cycles)) and self._share(self.applied) < down
        )

    def capture(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"applied": self.applied, "rates": self._rates}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.applied, self._rates = state["applied"], state["rates"]

    def _share(self, step: int) -> float:
        return cosine_restarts(step, self._steps, self.policy.cycles, self.policy.floor)


def _other_schedule(situation: Situation, _: InUse) -> Mapping[str, object] | None:
    if not situation.fitting:
        return None
    configs = situation.trainer.lr_scheduler_configs
    if configs:
        return {"scheduler": type(configs[0].scheduler).__name__}
    return {"scheduler": "DeepSpeed's"} if "scheduler" in situation.deepspeed_config else None


def _manual(situation: Situation, _: InUse) -> Mapping[str, object] | None:
    return {} if not situation.module.automatic_optimization else None


CYCLE_JOB = "schedule the learning rate"  # declared by ensembles whose members are cyclic
CYCLE_RULES = (
    Rule(
        when=rival(CYCLE_JOB),
        verdict="refused",
        words="{trick} with Cyclic sets the learning rate itself, and so does {other}",
        remedy="leave {other} out, or use LastK or TopK",
    ),
    Rule(
        when=_other_schedule,
        verdict="refused",
        words="{trick} with Cyclic sets the learning rate itself, and so does the scheduler {scheduler}",
        remedy="return the optimizer alone from `configure_optimizers`, or use LastK or TopK",
        known="built",
    ),
    Rule(
        when=_manual,
        verdict="refused",
        words="{trick} with Cyclic sets the learning rate between steps that Lightning takes, and here the module does",
        remedy="use automatic optimisation, or LastK or TopK",
    ),
)
