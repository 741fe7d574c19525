"""One device and DDP: whole parameters, whole gradients, averaged by DDP before the step."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.engines._base import BaseEngine
from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._gradients import (
    clamp_values,
    global_norm,
    gradients_of,
    group_norms,
    multiply,
    scale_to_norm,
)
from lightning_tricks.engines._steps import watch_steps
from lightning_tricks.engines._units import Limits, clip_whole_units, share

__all__ = ["PlainEngine"]


class PlainEngine(BaseEngine):
    """The engine of `SingleDeviceStrategy` and `DDPStrategy`."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        super().__init__(trainer, name)
        self._applied = -1
        watch_steps(self)

    def _norm(self, optimizer: Optimizer) -> Tensor:
        self._refuse_scaled_gradients(optimizer)
        return global_norm(gradients_of(optimizer), self._device)

    def _group_norms(self, optimizer: Optimizer, groups: list[list[Tensor]]) -> Tensor:
        self._refuse_scaled_gradients(optimizer)
        return group_norms([self._gradients_of(optimizer, group) for group in groups], self._device)

    def _clip(self, optimizer: Optimizer, norm: Tensor, limit: float | Tensor) -> None:
        scale_to_norm(gradients_of(optimizer), norm, limit)

    def _clip_values(self, optimizer: Optimizer, parameters: list[Tensor], limit: float) -> Tensor:
        return clamp_values(self._gradients_of(optimizer, parameters), limit, self._device)

    def _clip_units(self, optimizer: Optimizer, parameters: list[Tensor], limits: Limits) -> Tensor:
        own = _trained_by(optimizer, parameters)
        if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in own):
            raise refusal("sparse_units", engine=self.name)
        return share(self._clip_own_units(own, limits), self._device)

    def _clip_own_units(self, parameters: list[Tensor], limits: Limits) -> list[tuple[Tensor, int]]:
        return [clip_whole_units(parameters, limits, self._device)]

    def _scale_groups(self, optimizer: Optimizer, groups: list[tuple[list[Tensor], Tensor]]) -> None:
        for parameters, factor in groups:
            multiply(self._gradients_of(optimizer, parameters), factor)

    def _gradients_of(self, optimizer: Optimizer, parameters: list[Tensor]) -> list[Tensor]:
        """The gradients of those parameters that the optimizer trains."""
        own = _trained_by(optimizer, parameters)
        return [parameter.grad for parameter in own if parameter.grad is not None]

    def _scale(self, optimizer: Optimizer, factor: float) -> None:
        self._refuse_scaled_gradients(optimizer)
        multiply(gradients_of(optimizer), factor)

    def _leave_out(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        for parameter in _trained_by(optimizer, parameters):
            parameter.grad = None

    def awaits_gradients(self) -> bool:
        """Not on one device."""
        return self.name != "one_device"

    def _veto(self, optimizer: Optimizer) -> None:
        """Without a gradient, an optimizer leaves a parameter, its moments and its step count alone."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if self.scales_loss():
            scaler = self._trainer.precision_plugin.scaler  # type: ignore[attr-defined]
            # The scaler counts this as one more step without overflow. One that did overflow resets the count anyhow.
            state = scaler.state_dict()
            scaler.load_state_dict({**state, "_growth_tracker": state["_growth_tracker"] - 1})

    def was_step_applied(self) -> bool:
        """Whether the optimizer ran in the last step, on gradients."""
        return self._applied == self._trainer.global_step - 1 >= 0

    def scales_loss(self) -> bool:
        """Whether a gradient scaler is at work."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return scaler is not None and bool(scaler.is_enabled())

    def unscaled_loss(self, loss: Tensor) -> Tensor:
        """Without what the scaler multiplied it by."""
        if not self.scales_loss():
            return loss
        # `get_scale` would wait for the device.
        scale: Tensor = self._trainer.precision_plugin.scaler.scale(torch.ones_like(loss))  # type: ignore[attr-defined]
        return loss / scale

    def _call_training_step(self, *arguments: Any) -> None:
        """Past DDP, which would hand out rank 0's buffers."""
        if type(self) is PlainEngine:
            self._module.training_step(*arguments)
        else:
            super()._call_training_step(*arguments)

    def step_ran(self, optimizer: Optimizer) -> None:
        """Called after every `step()` of every torch optimizer of this process."""
        trainer = self._reference()
        ours = trainer is not None and any(optimizer is own for own in trainer.optimizers)
        if trainer is not None and ours:
            self._applied = self._applied if self._is_vetoed(optimizer) else trainer.global_step
            self._forget_step(optimizer)

    def _refuse_scaled_gradients(self, optimizer: Optimizer) -> None:
        """Lightning unscales fp16 gradients before `on_before_optimizer_step`, but not those of fused optimizers."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise refusal("fused_scaler", engine=self.name, optimizer=type(optimizer).__name__)


def _trained_by(optimizer: Optimizer, parameters: list[Tensor]) -> list[Tensor]:
    ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in parameters if id(parameter) in ours]
