"""One device and DDP: whole parameters, whole gradients, averaged by DDP before the step."""

from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.engines._base import BaseEngine
from lightning_tricks.engines._gradients import global_norm, gradients_of, scale_to_norm
from lightning_tricks.errors import UnsupportedError

__all__ = ["PlainEngine"]


class PlainEngine(BaseEngine):
    """The engine of `SingleDeviceStrategy` and `DDPStrategy`."""

    def _norm(self, optimizer: Optimizer) -> Tensor:
        self._refuse_scaled_gradients(optimizer)
        return global_norm(gradients_of(optimizer), self._device)

    def _clip(self, optimizer: Optimizer, norm: Tensor, limit: float | Tensor) -> None:
        scale_to_norm(gradients_of(optimizer), norm, limit)

    def _refuse_scaled_gradients(self, optimizer: Optimizer) -> None:
        """Lightning unscales fp16 gradients before `on_before_optimizer_step`, but not those of fused optimizers."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UnsupportedError(
                "The gradient norm",
                f"{self.name} with precision '16-mixed'",
                f"a fused {type(optimizer).__name__} unscales its gradients inside its step",
                "pass `fused=False` to the optimizer, or use `precision='bf16-mixed'`",
            )
