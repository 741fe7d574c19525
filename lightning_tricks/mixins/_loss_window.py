"""What one accumulation window knows of its loss: how much it has summed, over how many, and what a step must mend."""

from collections.abc import MutableMapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.engines import HeldSchedules, engine_of
from lightning_tricks.errors import DataError, MisconfigurationError

__all__ = ["LossWindow", "shared"]

_MIXES = ("AddBackward0", "DivBackward0", "MulBackward0", "SubBackward0")


class LossWindow(Callback):
    """Counts what the losses of an accumulation window are sums over, and divides its gradients by the total.

    How much a window will hold is known only at its end. So each micro-batch is divided by a provisional count, the
    first micro-batch's times their number, which keeps gradients as large as those of a mean; and before the step they
    are scaled by the provisional count over the true one. Lightning's and the engine's own divisions, by micro-batches
    and by ranks, are undone beforehand.

    A module that needs it puts it first in the Trainer's list, during a fit: whatever measures or clips comes after.
    """

    def __init__(self) -> None:
        self._held = HeldSchedules()
        self._warned = False
        self._empty()

    def _empty(self) -> None:
        self._provisional: Tensor | None = None  # 0 until a micro-batch has held anything
        self._seen: Tensor | None = None  # the sum of losses and the count, over ranks, of what went backward
        self._pending: Tensor | None = None  # the same, of the batch under way
        self._node: Any = None  # where the loss of the batch under way begins, in the graph
        self._backward = False

    def join(self, trainer: Trainer) -> None:
        """Take the first place in the Trainer's list. The list is replaced, since someone may be going through it."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(one is self for one in callbacks):
            self._empty()  # of a fit that ended in mid-window
        if callbacks[:1] != [self]:
            trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]

    def add(self, loss: Tensor, numbers: Tensor, micro_batches: int, ranks: int) -> Tensor:
        """One batch of the window.

        Args:
            loss: this rank's sum, with its graph.
            numbers: the sum and the count over all ranks.
            micro_batches: the number of micro-batches by which Lightning will divide.
            ranks: the number of ranks by which the engine will divide.

        Returns:
            The mean of the window so far, whose gradient is what accumulation needs.
        """
        accumulates = micro_batches > 1
        if accumulates and self._pending is not None:
            raise MisconfigurationError(
                "two normalised losses in one training step: under accumulation a step's gradient has one count. Add"
                " sums and counts up, and normalise them once."
            )
        known = self._provisional if accumulates and self._provisional is not None else torch.zeros_like(numbers[1])
        self._provisional = torch.where(known > 0, known, numbers[1] * micro_batches)
        self._pending = numbers if self._pending is None else self._pending + numbers
        so_far = numbers if self._seen is None or not accumulates else self._seen + numbers
        factor = micro_batches * ranks / _or_one(self._provisional)
        own = loss.detach() * ranks / _or_one(numbers[1])
        result = shared(loss, so_far[0] / _or_one(so_far[1]), own, factor)
        self._node = result.grad_fn
        return result

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step that returned no loss has left its counts behind."""
        self._held.release()
        self._pending, self._backward = None, False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """What goes backward counts."""
        if self._pending is None:
            return
        if trainer.accumulate_grad_batches > 1 and not _is_multiple(loss, self._node):
            raise MisconfigurationError(
                "`training_step` adds something to the normalised loss: under accumulation that would be divided by"
                " this loss's count. Add it to the sum, times the count, before it is normalised."
            )
        self._seen = self._pending if self._seen is None else self._seen + self._pending
        self._pending, self._node, self._backward = None, None, True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Divide by the true count. Whether there is one must be known before the step: the device is waited for."""
        if self._seen is None or self._provisional is None or not engine_of(trainer).is_optimizer_step():
            return
        provisional, count = torch.stack([self._provisional, self._seen[1]]).tolist()
        self._provisional = self._seen = None
        require_count(count)
        if count == 0:
            self._skip(trainer, optimizer)
        elif trainer.accumulate_grad_batches > 1 and provisional != count:
            engine_of(trainer).scale_gradients(optimizer, provisional / count)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Callbacks that read `outputs["loss"]` get what `training_step` returned, undivided."""
        if self._backward and isinstance(outputs, MutableMapping):
            outputs["loss"] = outputs["loss"] * trainer.accumulate_grad_batches
        self._backward = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Schedules by epoch follow: those go on."""
        self._held.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was found."""
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer as it was found."""
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        self._held.release()
        self._empty()
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [one for one in callbacks if one is not self]  # type: ignore[attr-defined]

    def _skip(self, trainer: Trainer, optimizer: Optimizer) -> None:
        engine_of(trainer).veto_step(optimizer)
        self._held.hold(trainer)
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"The loss of step {trainer.global_step} is a sum over nothing, on all ranks: the step is skipped, as"
                " will be others like it. Look at the masks and labels of its batches."
            )


def require_count(count: float) -> None:
    """Refuse a count that is a sum with something negative or not finite in it, which `NormalizesLosses` marks by NaN.

    Raises:
        DataError: on every rank, since the count is that of all.
    """
    if not 0 <= count < float("inf"):
        raise DataError(
            "a normalised loss got a `count` that is negative or not finite, on this rank or another: pass the number"
            " of tokens or samples that its sum is over, 0 or more."
        )


class _Shared(torch.autograd.Function):
    """A value beside the gradient of another: of the whole batch, and of this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, _loss: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None, None


def shared(loss: Tensor, value: Tensor, own: Tensor, factor: Tensor) -> Tensor:
    """`value`, with the gradient of `loss` times `factor`.

    Where `value` is not finite but `own` is, that is what comes out: who asks which rank's loss is not finite, as
    NonFiniteGuard does, shall get an answer.

    Example:
        >>> loss = torch.tensor(3.0, requires_grad=True)
        >>> out = shared(loss, torch.tensor(2.5), torch.tensor(3.0), torch.tensor(0.5))
        >>> out.backward()
        >>> out.item(), loss.grad
        (2.5, tensor(0.5000))
    """
    result: Tensor = _Shared.apply(loss, torch.where(value.isfinite(), value, own), factor)  # type: ignore[no-untyped-call]
    return result


def _or_one(count: Tensor) -> Tensor:
    return torch.where(count == 0, 1.0, count)


def _is_multiple(loss: Tensor, node: Any) -> bool:
    """Whether `loss` is that of `node`, scaled by numbers."""
    at: Any = loss.grad_fn
    while at is not None and at is not node:
        before = [previous for previous, _ in at.next_functions if previous is not None]
        if len(before) != 1 and (at.name() in _MIXES or node not in before):
            return False
        at = node if node in before else before[0]
    return at is node
