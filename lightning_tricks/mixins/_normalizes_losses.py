"""The base of mixins whose losses are means over all ranks and over whole accumulation windows."""

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_tricks.engines import Engine, Rule, check_before_fit, engine_of
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.mixins._loss_window import LossWindow, require_count, shared

__all__ = ["DIVIDED_TWICE", "NormalizesLosses"]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Base
else:
    _Base = object


DIVIDED_TWICE = Rule(
    when=lambda now, _: (
        {}
        if now.zero and now.trainer.strategy.handles_gradient_accumulation and now.trainer.accumulate_grad_batches > 1
        else None
    ),
    verdict="refused",
    words="Lightning's own DeepSpeedStrategy divides the loss by `accumulate_grad_batches` twice, which {trick} would"
    " undo once",
    remedy="use `strategy='{engine}'`",
)


class NormalizesLosses(_Base):
    """Divides a sum of losses by what it is over, on all ranks and over the window."""

    _loss_window: LossWindow | None = None

    def on_train_start(self) -> None:
        """Check what depends on the data, before the first step."""
        super().on_train_start()
        check_before_fit(self.trainer, self, "data")

    def _normalized(self, loss: Tensor, count: int | float | Tensor) -> Tensor:
        """The mean of all ranks' losses, with the gradient that its mean needs. Collective within a Trainer."""
        trainer = self._present_trainer()
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            raise MisconfigurationError(
                f"`sum_of_losses` must be one floating number, got {_told(loss)}: call `.sum()`."
            )
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        windowed = trainer is not None and trainer.training and self.automatic_optimization
        fault = windowed and not loss.requires_grad
        own = torch.stack([loss.detach(), _valid(count, loss) * (math.nan if fault else 1.0)])
        engine = engine_of(trainer) if trainer is not None else None
        numbers = own if engine is None else engine.sum_over_ranks(own)
        if fault:
            raise MisconfigurationError(
                "`sum_of_losses` has no gradient: compute it from the module's output, also where nothing counts."
            )
        if numbers.device.type == "cpu":
            require_count(float(numbers[1]))
        if trainer is not None and engine is not None and windowed:
            return self._in_window(trainer, engine, loss, numbers)
        divisor = torch.where(numbers[1] == 0, 1.0, numbers[1])
        ranks = 1 if engine is None else engine.world_size
        return shared(loss, numbers[0] / divisor, loss.detach() * ranks / divisor, ranks / divisor)

    def _in_window(self, trainer: Trainer, engine: Engine, loss: Tensor, numbers: Tensor) -> Tensor:
        if self._loss_window is None:
            self._loss_window = LossWindow()
        self._loss_window.join(trainer)
        return self._loss_window.add(loss, numbers, trainer.accumulate_grad_batches, engine.world_size)

    def _present_trainer(self) -> Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # not attached to one
            return None


def _valid(count: Any, like: Tensor) -> Tensor:
    """The count beside the loss; not a number if it is none, which every rank then learns."""
    if (
        isinstance(count, bool)
        or not isinstance(count, int | float | Tensor)
        or (isinstance(count, Tensor) and count.ndim)
    ):
        raise MisconfigurationError(f"`count` must be one number, got {_told(count)}: call `.sum()` on a mask.")
    found = torch.as_tensor(count).detach().to(like)
    return torch.where((found >= 0) & found.isfinite(), found, math.nan)


def _told(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
