"""Warm the learning rate up and let it down again, by optimizer steps that were really taken."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.callbacks._learning_rate_policies import LearningRatePolicy, require_end, require_share
from lightning_tricks.engines import InUse, Rule, Situation, Trick, add_schedule, rival
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import linear_warmup

__all__ = ["LearningRateSchedule"]


def _steps_by_hand(now: Situation, _: InUse) -> Mapping[str, object] | None:
    return {} if not now.module.automatic_optimization else None


def _own_schedule(now: Situation, _: InUse) -> Mapping[str, object] | str | None:
    if not now.fitting or not now.optimizers:
        return "a schedule of the module's own would be refused, which is known once it is built"
    kinds = [type(config.scheduler) for config in now.trainer.lr_scheduler_configs]
    own = [kind.__name__ for kind in kinds if not kind.__module__.startswith("lightning_tricks.")]
    return {"own": own[0], "module": type(now.module).__name__} if own else None


def _end_unknown(now: Situation, used: InUse) -> Mapping[str, object] | None:
    changes = [
        other.name
        for other in now.tricks
        if "change the accumulation" in other.trick.jobs
        or ("choose the accumulation" in other.trick.jobs and len(other.source.target) > 1)
    ]
    return {"other": changes[0]} if changes and used.source.total_steps == "auto" else None


class LearningRateSchedule(TrickCallback):
    """Warms the learning rate up linearly, then lets a policy decide, in optimizer steps that were really taken.

    Micro-batches do not count, nor do steps that were dropped, by `NonFiniteGuard` or a loss scaler. The optimizer's
    learning rate is the highest one; each parameter group keeps its own. Underneath is torch's `LambdaLR`, which
    Lightning steps, saves, restores and shows to `LearningRateMonitor`; the module returns its optimizer alone.

    Args:
        policy: what comes after the warm-up: `Constant()`, `Linear()`, `Cosine()`, `InverseSquareRoot(timescale)`,
            `WarmupStableDecay()`, or a class of your own with their one method.
        warmup: optimizer steps if a whole number of 0 or more; a share of all steps if a number above 0 and below 1.
            1% to 10% of the steps is usual.
        start: the share of the highest rate in the first step of the warm-up, from 0 to 1.
        total_steps: optimizer steps from the first to the last; `"auto"`: as many as the Trainer will take.

    Raises:
        MisconfigurationError: if an option is out of range, or, before the first step, if the warm-up is not shorter
            than training, or a policy must know the end of a fit that has none.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import Cosine, LearningRateSchedule
        >>> schedule = LearningRateSchedule(Cosine(end=0.1), warmup=0.05)
        >>> trainer = Trainer(callbacks=[schedule], accelerator="cpu", logger=False)

    References:
        Goyal et al.: Accurate, Large Minibatch SGD (2017), for the warm-up; the policies name theirs.
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("schedule the learning rate",),
        needs=("was_step_applied",),
        rules=(
            Rule(
                when=_steps_by_hand,
                verdict="refused",
                words="under manual optimisation Lightning steps no schedule, {trick}'s neither",
                remedy="use automatic optimisation, or a schedule of torch's that the module steps",
            ),
            Rule(
                when=_own_schedule,
                verdict="refused",
                words="{trick} and the {own} that {module}.configure_optimizers returns both set the learning rate",
                remedy="return the optimizer alone, or leave {trick} out",
                known="built",
            ),
            Rule(
                when=rival("schedule the learning rate"),
                verdict="refused",
                words="{trick} and {other} both set the learning rate",
                remedy="keep one",
            ),
            Rule(
                when=_end_unknown,
                verdict="refused",
                words="how many steps this fit takes is not known, since {other} changes how many batches each has",
                remedy="pass `total_steps` to {trick}",
            ),
        ),
    )

    place: ClassVar[int | None] = 4  # after whoever chooses how many batches a step has

    def __init__(
        self,
        policy: LearningRatePolicy,
        *,
        warmup: int | float = 0,
        start: float = 0.01,
        total_steps: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(policy, LearningRatePolicy):
            raise MisconfigurationError(f"`policy` must be one such as `Cosine()`, got {policy!r}.")
        require_share("start", start)
        whole = isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0
        if not whole and not (isinstance(warmup, float) and 0 < warmup < 1):
            raise MisconfigurationError(
                f"`warmup` must be a whole number of optimizer steps, 0 or more, or a share of all steps above 0 and"
                f" below 1, got {warmup!r}."
            )
        if total_steps != "auto" and (
            isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
        ):
            raise MisconfigurationError(
                f"`total_steps` must be 'auto' or a whole number of optimizer steps above 0, got {total_steps!r}."
            )
        self.policy = policy
        self.warmup = warmup
        self.start = start
        self.total_steps = total_steps
        self._total = 0  # of this fit; 0: without end
        self._warmup = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the schedule where Lightning keeps its own, before it restores them."""
        super().on_fit_start(trainer, pl_module)
        self._total = self._warmup = 0
        add_schedule(trainer, self._factor, self.engine.was_step_applied)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how long training is. Asked earlier, loaders would be set up before their position is restored."""
        total = trainer.estimated_stepping_batches if self.total_steps == "auto" else self.total_steps
        self._total = 0 if total == float("inf") or total < 0 else int(total)
        self._warmup = self._warmup_of(self._total)
        if self._total and self._warmup >= self._total:
            raise MisconfigurationError(
                f"a warm-up of {self._warmup} steps is as long as training or longer, which takes {self._total}: lower"
                " `warmup`, or train for longer."
            )
        self.policy.factor(0, self._total - self._warmup if self._total else 0)  # refuses before the first step

    def _warmup_of(self, total: int) -> int:
        if isinstance(self.warmup, int):
            return self.warmup
        return max(1, round(self.warmup * require_end(total, self)))

    def _factor(self, step: int) -> float:
        if step == 0:  # asked for before the end is known
            return self.start if self.warmup else self.policy.factor(0, 1)
        if step < self._warmup:
            return linear_warmup(step, self._warmup, self.start)
        return self.policy.factor(step - self._warmup, self._total - self._warmup if self._total else 0)
