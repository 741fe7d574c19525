"""Class-weighted cross-entropy whose mean is the same however the data are spread over ranks and micro-batches."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_tricks.engines import Trick, engine_of, is_aside
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional import log_prior, two_class_logits
from lightning_tricks.mixins._class_checks import (
    Counts,
    class_fault,
    require_shapes,
    warn_of_absent,
    warn_of_two,
    weights_of,
)
from lightning_tricks.mixins._class_losses import ClassLoss, CrossEntropy, balances
from lightning_tricks.mixins._class_report import ClassRecalls, ClassRow, table
from lightning_tricks.mixins._class_weights import Balanced, ClassWeights, EffectiveNumber
from lightning_tricks.mixins._normalizes_losses import DIVIDED_TWICE, NormalizesLosses
from lightning_tricks.mixins._order import require_before_lightning_module

__all__ = ["ClassWeightedLossMixin"]

_CROSS_ENTROPY = CrossEntropy()
_RECALLS = "class_recalls"  # in a checkpoint


def _has_weights(module: Any) -> bool:
    return "class_weights" in module._buffers


def _corrects(module: Any) -> bool:
    """Whether rare classes count more: by their weights, or by the loss itself."""
    weights = module.class_weights
    return balances(module._class_loss) or weights.is_meta or bool((weights != weights.flatten()[0]).any())


class ClassWeightedLossMixin(NormalizesLosses):
    """A loss in which rare classes weigh more, exact over ranks and accumulation windows.

    Name it before `LightningModule` among the base classes, call `weigh_classes` in `__init__`, and use
    `class_weighted_loss` in the steps. The weights are the buffer `class_weights`: fp32 at every precision, moved and
    saved with the module.

    If `validation_step` uses it too, the fit's end logs a table: each class's count, weight, and recall at the first
    and the last validation; `class_report()` gives it as data. The first is before training where the sanity check is
    of all validation data, as `Trainer(num_sanity_val_steps=-1)` has it, and otherwise comes after some of it.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from lightning_tricks.mixins import ClassWeightedLossMixin
        >>> class Classifier(ClassWeightedLossMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weigh_classes([50, 30, 20])
        >>> Classifier().class_weighted_loss(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(1.0986)

    References:
        King, Zeng: Logistic regression in rare events data (Political Analysis, 2001).
    """

    trick: ClassVar[Trick] = Trick(
        jobs=("balance classes",),
        needs=("scale_gradients", "sum_over_ranks", "veto_step"),
        rules=(DIVIDED_TWICE,),
        used=_has_weights,
        does=_corrects,
    )
    class_weights: Tensor
    class_counts: Tensor
    _class_loss: ClassLoss
    _class_prior: Tensor
    _class_recalls: ClassRecalls

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_before_lightning_module(cls, ClassWeightedLossMixin)

    def weigh_classes(
        self, counts: Counts, policy: ClassWeights | None = None, *, loss: ClassLoss = _CROSS_ENTROPY
    ) -> None:
        """Set the weights of the classes, and the loss that they weigh.

        Args:
            counts: examples per class in the training set (and in no other), of shape (K,); or for K labels, any number
                of which may hold, those without and with each, of shape (K, 2). `data.count_classes` counts.
            policy: how counts become weights: `Balanced()`, `EffectiveNumber(0.999)`, `InverseSquareRoot()`,
                `ExplicitWeights([...])`, or a rule of your own. None: `Balanced()`; equal weights for a loss that
                corrects the imbalance by itself.
            loss: `CrossEntropy(label_smoothing=0.1)`, `Focal(2.0)`, `LogitAdjusted(1.0)`, or one of your own.

        Raises:
            MisconfigurationError: if `counts` are not whole numbers of 0 or more, two at least, not all 0; or weights
                do not fit them, or are not finite and above 0.
            DataError: if all examples are of one class.
        """
        policy = policy or (EffectiveNumber(0.0) if balances(loss) else Balanced())
        weights = weights_of(counts, policy)
        warn_of_absent(counts, weights)
        warn_of_two(policy, weights, loss)
        self.register_buffer("class_weights", weights)
        self.register_buffer("class_counts", torch.as_tensor(counts, device="cpu").long(), persistent=False)
        self._class_prior, self._class_loss, self._class_recalls = log_prior(counts), loss, ClassRecalls()

    def class_weighted_loss(self, logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The weighted mean of the loss: the weighted sum over the sum of the weights, of all ranks together.

        Outside training, where `self.training` is false, logits are taken as they are: the prior that `LogitAdjusted`
        adds belongs to training alone. The loss is then that of the scores by which classes are decided.

        In training the mean is that of the whole optimizer step, its micro-batches included, as
        `LossNormalizationMixin.normalized_loss` says: what is logged in the training step, what adds nothing, and that
        the loss or a multiple of it is returned. Under manual optimisation each call is a mean of its own. Without a
        Trainer, cross-entropy equals `F.cross_entropy(..., weight=class_weights)`, but for a batch without a valid
        target, where it is 0. Collective: call it on every rank alike.

        Args:
            logits: scores of shape (N, K, ...), of any floating precision; the loss is computed in fp32. For labels,
                of shape (N, K). For two classes also of shape (N,): the second's score above the first's.
            targets: class indices, int64, of shape (N, ...), in [0, K) or equal to `ignore_index`. For labels, 0 or 1
                (or `ignore_index`), int64, of shape (N, K).
            ignore_index: the target that counts for nothing.

        Returns:
            The loss, fp32, zero-dimensional.

        Raises:
            MisconfigurationError: if the weights are not set or the shapes do not fit; or, under accumulation, if it is
                called twice in a training step or its result is mixed with another loss.
            DataError: if a target is no class, on this rank or another; this rank's is named, with its place. Only on
                the CPU: elsewhere that would wait for the device at every step, and the device itself stops with its
                own, less readable, error.
        """
        weights = self._checked_weights()
        require_shapes(logits, targets, weights)
        if targets.device.type == "cpu" and (fault := class_fault(targets, weights, ignore_index)):
            self._tell_of(fault, logits)
        labels = weights.ndim == 2
        scores = two_class_logits(logits) if labels or logits.ndim == 1 else logits
        prior = self._class_prior = self._class_prior.to(logits.device)
        if not self.training:
            seen = (logits if labels else scores).detach()
            self._class_recalls.add(seen, targets, len(weights), ignore_index, labels)
            prior = torch.zeros_like(prior)
        sums = self._class_loss.sums(scores, targets, weights, prior, ignore_index)
        try:
            return self._normalized(*sums)
        except DataError as error:
            raise DataError(
                "a target on another rank is no class: that rank names it. Or the sum of weights that "
                f"{type(self._class_loss).__name__} gives is negative or not finite."
            ) from error

    def _tell_of(self, fault: DataError, logits: Tensor) -> NoReturn:
        """Raise, on the other ranks too: they wait for this one's numbers."""
        with contextlib.suppress(DataError):
            self._normalized(logits.sum(), math.nan)
        raise fault

    def class_report(self) -> list[ClassRow]:
        """Each class's count, weight, and recall at the first and the last whole validation of the fits so far.

        With `Trainer(num_sanity_val_steps=-1)` the first is before training; otherwise it comes after some of it. Empty
        before the first one, and where `validation_step` does not call `class_weighted_loss`.
        """
        recalls = self._class_recalls
        if recalls.first is None or recalls.last is None:
            return []
        weights, counts = (self.class_weights.tolist(), self.class_counts.tolist())
        if self.class_weights.ndim == 2:  # of those that hold
            weights, counts = [pair[1] for pair in weights], [pair[1] for pair in counts]
        return [ClassRow(*row) for row in zip(counts, weights, recalls.first, recalls.last, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Keep the recalls of a whole validation of a fit."""
        super().on_validation_epoch_end()
        trainer = self._present_trainer()
        if trainer is not None and "class_weights" in self._buffers:
            keep = trainer.state.fn == "fit" and not is_aside(trainer) and _is_whole(trainer)
            total = engine_of(trainer).sum_over_ranks
            self._class_recalls.close(len(self.class_weights), total, self.device, keep, trainer.sanity_checking)

    def on_fit_end(self) -> None:
        """Log the report."""
        super().on_fit_end()
        if rows := self.class_report() if "class_weights" in self._buffers else []:
            told = table(rows, self._class_recalls.untrained)
            rank_zero_info(f"{type(self).__name__}, class by class:\n{told}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the first recalls for a resumed run."""
        super().on_save_checkpoint(checkpoint)
        if "class_weights" in self._buffers and self._class_recalls.first is not None:
            checkpoint[_RECALLS] = self._class_recalls.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        super().on_load_checkpoint(checkpoint)
        if "class_weights" in self._buffers and _RECALLS in checkpoint:
            self._class_recalls.load(checkpoint[_RECALLS])

    def _checked_weights(self) -> Tensor:
        if "class_weights" not in self._buffers:
            raise MisconfigurationError(
                f"{type(self).__name__} has no class weights: call `self.weigh_classes(counts)` in `__init__`, with "
                "the examples per class in the training set."
            )
        return self.class_weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module, but stay in fp32: engines turn whole modules into bf16."""
        exact = self._buffers.get("class_weights")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is not None:
            self.class_weights = exact.to(self.class_weights.device)
        return self


def _is_whole(trainer: Trainer) -> bool:
    """Whether this validation is of all that the fit validates on: a sanity check is, if it is told to."""
    fitted = zip(trainer.num_sanity_val_batches, trainer.num_val_batches, strict=False)
    return not trainer.sanity_checking or all(checked >= every for checked, every in fitted)
