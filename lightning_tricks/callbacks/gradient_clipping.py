"""Clip the global norm of the gradients once per optimizer step, at a limit that a policy sets."""

import copy
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.callbacks._clipping_policies import ClippingPolicy, FixedNorm, Value
from lightning_tricks.engines import Trick
from lightning_tricks.functional import clip_coefficient

__all__ = ["GradientClipping"]


class GradientClipping(TrickCallback):
    """Clips the global gradient norm once per optimizer step, on every engine alike.

    The norm is that of the whole model's accumulated, unscaled gradients over all ranks. Each optimizer step logs
    `grad_norm/total` (before clipping), `grad_norm/limit` and `grad_norm/clipped` (1 if the step was clipped, else
    0). A norm that is not finite clips nothing: finite gradients stay as they are. With several optimizers each one's
    gradients are clipped on their own, by statistics of their own, and the names end in `/optimizer_<index>`.

    Args:
        policy: what sets the limit: a number, which is the largest norm allowed (above 0; 1.0 suits most models), or
            a policy: `FixedNorm`, `Percentile`, `ZScore`, or `Value`, which clips each element.

    Raises:
        MisconfigurationError: if the limit is not a finite number above 0, or the Trainer, the engine or another
            callback clips already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import FixedNorm, GradientClipping, Percentile
        >>> GradientClipping(1.0).policy
        FixedNorm(limit=1.0)
        >>> trainer = Trainer(callbacks=[GradientClipping(Percentile(95))], accelerator="cpu", logger=False)

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (ICML 2013).
    """

    trick: ClassVar[Trick] = Trick(jobs=("clip gradients",), needs=("gradient_norm", "clip_gradient_norm"))

    place: ClassVar[int | None] = 2

    def __init__(self, policy: float | ClippingPolicy | Value = 1.0) -> None:
        super().__init__()
        self.policy = policy if isinstance(policy, ClippingPolicy | Value) else FixedNorm(policy)
        if isinstance(self.policy, Value):  # this instance needs something else, and is checked by that
            vars(self)["trick"] = Trick(jobs=self.trick.jobs, needs=("gradient_norm", "clip_gradient_value"))
        self._fresh = copy.deepcopy(self.policy)
        self._policies = {0: self.policy}  # by the optimizer's index

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, clip and log, if a real step follows."""
        if not self.engine.is_optimizer_step():
            return
        index = trainer.optimizers.index(optimizer)
        norm = self.engine.gradient_norm(optimizer)
        values = {"total": norm, **self._clip(optimizer, norm, self._policy(index))}
        suffix = f"/optimizer_{index}" if len(trainer.optimizers) > 1 else ""
        for name, value in values.items():
            pl_module.log(f"grad_norm/{name}{suffix}", value, on_step=True, on_epoch=False)

    def _clip(self, optimizer: Optimizer, norm: Tensor, policy: ClippingPolicy | Value) -> dict[str, Tensor]:
        """Clip by the norm or by value; what is logged besides the norm."""
        if isinstance(policy, Value):
            return {"clipped": self.engine.clip_gradient_value(optimizer, policy.largest)}
        limit = policy.limit(norm)
        self.engine.clip_gradient_norm(optimizer, limit)
        clipped = (clip_coefficient(norm, limit) < 1).to(norm.dtype)
        on_device = limit if isinstance(limit, Tensor) else torch.full_like(norm, limit)  # a fill waits for nothing
        return {"limit": on_device, "clipped": clipped}

    def _identity(self) -> dict[str, Any]:
        return {"policy": type(self.policy).__name__}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.claim_gradient_clipping("GradientClipping")

    def _policy(self, index: int) -> ClippingPolicy | Value:
        if index not in self._policies:
            self._policies[index] = copy.deepcopy(self._fresh)
        return self._policies[index]

    def _capture(self) -> dict[str, Any]:
        savers = {index: getattr(policy, "state_dict", None) for index, policy in self._policies.items()}
        return {"policies": {index: state_dict() for index, state_dict in savers.items() if state_dict is not None}}

    def _restore(self, state: dict[str, Any]) -> None:
        for index, saved in state.get("policies", {}).items():
            load_state_dict = getattr(self._policy(index), "load_state_dict", None)
            if load_state_dict is not None:
                load_state_dict(saved)
