"""Clip the global norm of the gradients once per optimizer step, at a limit that a policy sets."""

import math
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks._base import TrickCallback
from lightning_tricks.engines import Trick
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import clip_coefficient

__all__ = ["ClippingPolicy", "FixedNorm", "GradientClipping"]


@runtime_checkable
class ClippingPolicy(Protocol):
    """Sets the limit of each optimizer step from its gradient norm.

    A policy that learns from past norms also has `state_dict()` and `load_state_dict(state)`, in plain types and
    tensors: `GradientClipping` saves and restores them. It must not let a norm that is not finite into its state.
    """

    def limit(self, norm: Tensor) -> float | Tensor:
        """The largest norm allowed in this step.

        Args:
            norm: this step's global 2-norm, fp32, zero-dimensional, on the device; reading its value would wait.

        Returns:
            A number above 0, or a zero-dimensional tensor on the device of `norm`.
        """


class FixedNorm:
    """Clips every step at the same norm.

    Args:
        limit: largest gradient norm allowed, above 0; 0.1 to 10 is usual, 1.0 for transformers.

    Raises:
        MisconfigurationError: if the limit is not a finite number above 0.

    Example:
        >>> from lightning_tricks.callbacks import FixedNorm
        >>> FixedNorm(1.0)
        FixedNorm(limit=1.0)

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (ICML 2013).
    """

    def __init__(self, limit: float = 1.0) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit) or limit <= 0:
            raise MisconfigurationError(
                f"the limit of gradient clipping must be a finite number above 0, got {limit!r}. Leave "
                "GradientClipping out to train without clipping."
            )
        self._limit = float(limit)

    def limit(self, norm: Tensor) -> float | Tensor:  # config files match policies by this exact signature
        """The fixed limit, whatever the norm."""
        return self._limit

    def __repr__(self) -> str:
        return f"FixedNorm(limit={self._limit})"


class GradientClipping(TrickCallback):
    """Clips the global gradient norm once per optimizer step, on every engine alike.

    The norm is that of the whole model's accumulated, unscaled gradients over all ranks. Each optimizer step logs
    `grad_norm/total` (before clipping), `grad_norm/limit` and `grad_norm/clipped` (1 if the step was clipped, else
    0). A norm that is not finite clips nothing: finite gradients stay as they are. With several optimizers each one's
    gradients are clipped on their own, and the names end in `/optimizer_<index>`.

    Args:
        policy: what sets the limit: a number, which is the largest norm allowed (above 0; 1.0 suits most models), or
            a policy such as `FixedNorm`.

    Raises:
        MisconfigurationError: if the limit is not a finite number above 0, or the Trainer, the engine or another
            callback clips already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_tricks.callbacks import FixedNorm, GradientClipping
        >>> GradientClipping(1.0).policy
        FixedNorm(limit=1.0)
        >>> trainer = Trainer(callbacks=[GradientClipping(FixedNorm(1.0))], accelerator="cpu", logger=False)

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks (ICML 2013).
    """

    trick: ClassVar[Trick] = Trick(jobs=("clip gradients",), needs=("gradient_norm", "clip_gradient_norm"))

    place: ClassVar[int | None] = 2

    def __init__(self, policy: float | ClippingPolicy = 1.0) -> None:
        super().__init__()
        self.policy = policy if isinstance(policy, ClippingPolicy) else FixedNorm(policy)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, clip and log, if a real step follows."""
        if not self.engine.is_optimizer_step():
            return
        norm = self.engine.gradient_norm(optimizer)
        limit = self.policy.limit(norm)
        self.engine.clip_gradient_norm(optimizer, limit)
        suffix = f"/optimizer_{trainer.optimizers.index(optimizer)}" if len(trainer.optimizers) > 1 else ""
        _log(pl_module, norm, limit, suffix)

    def _identity(self) -> dict[str, Any]:
        return {"policy": type(self.policy).__name__}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.claim_gradient_clipping("GradientClipping")

    def _capture(self) -> dict[str, Any]:
        state_dict = getattr(self.policy, "state_dict", None)
        return {"policy": state_dict()} if state_dict is not None else {}

    def _restore(self, state: dict[str, Any]) -> None:
        load_state_dict = getattr(self.policy, "load_state_dict", None)
        if load_state_dict is not None and "policy" in state:
            load_state_dict(state["policy"])


def _log(pl_module: LightningModule, norm: Tensor, limit: float | Tensor, suffix: str) -> None:
    clipped = (clip_coefficient(norm, limit) < 1).to(norm.dtype)
    on_device = limit if isinstance(limit, Tensor) else torch.full_like(norm, limit)  # a fill waits for nothing
    for name, value in (("total", norm), ("limit", on_device), ("clipped", clipped)):
        pl_module.log(f"grad_norm/{name}{suffix}", value, on_step=True, on_epoch=False)
