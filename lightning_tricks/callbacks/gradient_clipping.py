"""Clip the gradients once per optimizer step: their norm, at a limit that a policy sets, or parts of them."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.callbacks._clipping_groups import ClippedGroups, ClippedWhole
from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm
from lightning_tricks.callbacks._gradient_policies import GradientPolicy
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError

__all__ = ["GradientClipping"]


class GradientClipping(TrickCallback):
    """Clips the gradients once per optimizer step, on every engine alike: the norm of all, unless the policy differs.

    The norm is that of the whole model's accumulated, unscaled gradients over all ranks. Each optimizer step logs
    `grad_norm/total` (before clipping), `grad_norm/limit` and `grad_norm/clipped` (1 if the step was clipped, else
    0). A norm that is not finite clips nothing: finite gradients stay as they are. With several optimizers each one's
    gradients are clipped on their own, by statistics of their own, and the names end in `/optimizer_<index>`.

    With a mapping each part of the model has a norm, a limit and statistics of its own, logged as `grad_norm/<part>`,
    `grad_norm/limit/<part>` and `grad_norm/clipped/<part>`. A parameter belongs to the first part that selects it; one
    that none selects is not clipped.

    Args:
        policy: what sets the limit: a number, which is the largest norm allowed (above 0; 1.0 suits most models), or
            a policy: `FixedNorm`, `Percentile`, `ZScore`, or one that acts on parts of the gradients: `Value` on each
            element, `UnitwiseAdaptive` on each unit; or a mapping from prefixes of parameter names (`encoder`) or
            patterns (`head.*`) to such.

    Raises:
        MisconfigurationError: if a limit is not a finite number above 0, a part selects no parameter that is left for
            it, or the Trainer, the engine or another callback clips already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import FixedNorm, GradientClipping, Percentile
        >>> GradientClipping(1.0).policy
        FixedNorm(limit=1.0)
        >>> GradientClipping({"encoder": 1.0, "head": Percentile(95)}).policy["encoder"]
        FixedNorm(limit=1.0)
        >>> trainer = Trainer(callbacks=[GradientClipping(Percentile(95))], accelerator="cpu", logger=False)

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (ICML 2013).
    """

    trick: ClassVar[Trick] = Trick(jobs=("clip gradients",), needs=("gradient_norm", "clip_gradient_norm"))

    place: ClassVar[int | None] = 2

    def __init__(
        self,
        policy: float | ClippingPolicy | GradientPolicy | dict[str, float | ClippingPolicy | GradientPolicy] = 1.0,
    ) -> None:
        super().__init__()
        self.policy = _policies(policy) if isinstance(policy, Mapping) else _policy(policy)
        vars(self)["trick"] = Trick(jobs=self.trick.jobs, needs=_needs(self.policy))  # this very instance's
        self._fresh = copy.deepcopy(self.policy)
        self._clipped = {0: self._clip_by(self.policy)}  # by the optimizer's index

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the parameters of each part."""
        super().on_fit_start(trainer, pl_module)
        for index, optimizer in enumerate(trainer.optimizers):
            self._of(index).find(pl_module, optimizer if len(trainer.optimizers) > 1 else None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, clip and log, if a real step follows."""
        if not self.engine.is_optimizer_step():
            return
        index = trainer.optimizers.index(optimizer)
        norm = self.engine.gradient_norm(optimizer)
        values = {"total": norm, **self._of(index).clip(self.engine, optimizer, norm)}
        suffix = f"/optimizer_{index}" if len(trainer.optimizers) > 1 else ""
        for name, value in values.items():
            pl_module.log(f"grad_norm/{name}{suffix}", value, on_step=True, on_epoch=False)

    def _identity(self) -> dict[str, Any]:
        if isinstance(self.policy, dict):
            return {"policy": {part: type(policy).__name__ for part, policy in self.policy.items()}}
        return {"policy": type(self.policy).__name__}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.claim_gradient_clipping("GradientClipping")

    def _of(self, index: int) -> ClippedWhole | ClippedGroups:
        if index not in self._clipped:
            self._clipped[index] = self._clip_by(copy.deepcopy(self._fresh))
        return self._clipped[index]

    @staticmethod
    def _clip_by(policy: Any) -> ClippedWhole | ClippedGroups:
        return ClippedGroups(policy) if isinstance(policy, dict) else ClippedWhole(policy)

    def _capture(self) -> dict[str, Any]:
        states = {index: clipped.state_dict() for index, clipped in self._clipped.items()}
        return {"policies": {index: state for index, state in states.items() if state}}

    def _restore(self, state: dict[str, Any]) -> None:
        for index, saved in state.get("policies", {}).items():
            self._of(index).load_state_dict(saved)


def _policies(
    given: Mapping[str, float | ClippingPolicy | GradientPolicy],
) -> dict[str, ClippingPolicy | GradientPolicy]:
    if not given:
        raise MisconfigurationError("GradientClipping was given no part of the model: leave it out, or pass 1.0.")
    return {part: _policy(policy) for part, policy in given.items()}


def _policy(given: Any) -> ClippingPolicy | GradientPolicy:
    return given if isinstance(given, ClippingPolicy | GradientPolicy) else FixedNorm(given)


def _needs(policy: Any) -> tuple[str, ...]:
    """The methods of the engine that it is checked by before a fit."""
    if isinstance(policy, dict):
        needs = {need for each in policy.values() for need in _needs(each) if need != "clip_gradient_norm"}
        return tuple(sorted({*needs, "gradient_norms", "scale_gradient_groups"}))
    own = getattr(policy, "needs", ()) if isinstance(policy, GradientPolicy) else ("clip_gradient_norm",)
    return ("gradient_norm", *own)
