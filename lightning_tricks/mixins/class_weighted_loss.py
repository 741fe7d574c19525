"""Class-weighted cross-entropy whose mean is the same however the data are spread over ranks and micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_tricks.engines import Trick, engine_of, is_aside
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional import log_prior, two_class_logits
from lightning_tricks.mixins._class_losses import ClassLoss, CrossEntropy
from lightning_tricks.mixins._class_report import ClassRecalls, ClassRow, table
from lightning_tricks.mixins._class_weights import Balanced, ClassWeights
from lightning_tricks.mixins._normalizes_losses import DIVIDED_TWICE, NormalizesLosses
from lightning_tricks.mixins._order import require_before_lightning_module

__all__ = ["ClassWeightedLossMixin"]

Counts = Sequence[int] | Sequence[Sequence[int]] | Tensor
_BALANCED, _CROSS_ENTROPY = Balanced(), CrossEntropy()
_HOLDS = ("no", "yes")  # of a label
_RECALLS = "class_recalls"  # in a checkpoint: at the first validation, and at the last


def _weighs(module: Any) -> bool:
    weights = module._buffers.get("class_weights")
    return weights is not None and (weights.is_meta or bool((weights != weights.flatten()[0]).any()))


class ClassWeightedLossMixin(NormalizesLosses):
    """A loss in which rare classes weigh more, exact over ranks and accumulation windows.

    Name it before `LightningModule` among the base classes, call `weigh_classes` in `__init__`, and use
    `class_weighted_loss` in the steps. The weights are the buffer `class_weights`: fp32 at every precision, moved and
    saved with the module.

    If `validation_step` uses it too, the fit's end logs a table: each class's count, weight, and recall at the first
    and the last validation; `class_report()` gives it as data.

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
        used=_weighs,
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
        self, counts: Counts, policy: ClassWeights = _BALANCED, *, loss: ClassLoss = _CROSS_ENTROPY
    ) -> None:
        """Set the weights of the classes, and the loss that they weigh.

        Args:
            counts: examples per class in the training set (and in no other), of shape (K,); or for K labels, any number
                of which may hold, those without and with each, of shape (K, 2). `data.count_classes` counts.
            policy: how counts become weights: `Balanced()`, `EffectiveNumber(0.999)`, `InverseSquareRoot()`,
                `ExplicitWeights([...])`, or a rule of your own.
            loss: `CrossEntropy(label_smoothing=0.1)`, `Focal(2.0)`, `LogitAdjusted(1.0)`, or one of your own.

        Raises:
            MisconfigurationError: if `counts` are not whole numbers of 0 or more, two at least, not all 0; or weights
                do not fit them.
        """
        weights = _weights_of(counts, policy)
        _warn_of_absent(counts, weights)
        self.register_buffer("class_weights", weights)
        self.register_buffer("class_counts", torch.as_tensor(counts, device="cpu").long(), persistent=False)
        self._class_prior, self._class_loss, self._class_recalls = log_prior(counts), loss, ClassRecalls()

    def class_weighted_loss(self, logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The weighted mean of the loss: the weighted sum over the sum of the weights, of all ranks together.

        In training the mean is that of the whole optimizer step, its micro-batches included, as
        `LossNormalizationMixin.normalized_loss` says: what is logged in the training step, what adds nothing, and that
        the loss or a multiple of it is returned. Under manual optimisation each call is a mean of its own. Without a
        Trainer, cross-entropy equals `F.cross_entropy(..., weight=class_weights)`, but for a batch without a valid
        target, where it is 0. Collective: call it on every rank alike.

        Args:
            logits: scores of shape (N, K, ...), of any floating precision; the loss is computed in fp32. For labels,
                of shape (N, K).
            targets: class indices, int64, of shape (N, ...), in [0, K) or equal to `ignore_index`. For labels, 0 or 1
                (or `ignore_index`), int64, of shape (N, K).
            ignore_index: the target that counts for nothing.

        Returns:
            The loss, fp32, zero-dimensional.

        Raises:
            MisconfigurationError: if the weights are not set or the shapes do not fit; or, under accumulation, if it is
                called twice in a training step or its result is mixed with another loss.
            DataError: if a target is no class. Only on the CPU: elsewhere that would wait for the device at every step,
                and the device itself stops with its own, less readable, error.
        """
        weights = self._checked_weights()
        labels = weights.ndim == 2
        (_require_label_shapes if labels else _require_shapes)(logits, targets, len(weights))
        if targets.device.type == "cpu":
            _require_classes(targets, 2 if labels else len(weights), ignore_index)
        if not self.training:
            self._class_recalls.add(logits.detach(), targets, len(weights), ignore_index, labels)
        scores = two_class_logits(logits) if labels else logits
        prior = self._class_prior = self._class_prior.to(logits.device)
        return self._normalized(*self._class_loss.sums(scores, targets, weights, prior, ignore_index))

    def class_report(self) -> list[ClassRow]:
        """Each class's count, weight, and recall at the first and the last whole validation of the fits so far.

        Empty before the first one, and where `validation_step` does not call `class_weighted_loss`.
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
            keep = trainer.state.fn == "fit" and not (trainer.sanity_checking or is_aside(trainer))
            total = engine_of(trainer).sum_over_ranks
            self._class_recalls.close(len(self.class_weights), total, self.device, keep)

    def on_fit_end(self) -> None:
        """Log the report."""
        super().on_fit_end()
        if rows := self.class_report() if "class_weights" in self._buffers else []:
            rank_zero_info(f"{type(self).__name__}, class by class:\n{table(rows)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the first recalls for a resumed run."""
        super().on_save_checkpoint(checkpoint)
        if "class_weights" in self._buffers and self._class_recalls.first is not None:
            checkpoint[_RECALLS] = [self._class_recalls.first, self._class_recalls.last]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        super().on_load_checkpoint(checkpoint)
        if "class_weights" in self._buffers and _RECALLS in checkpoint:
            self._class_recalls.first, self._class_recalls.last = checkpoint[_RECALLS]

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


def _weights_of(counts: Any, policy: ClassWeights) -> Tensor:
    try:
        labels = torch.as_tensor(counts).ndim == 2
    except (TypeError, ValueError, RuntimeError):  # no numbers, or ragged: the policy says so
        labels = False
    return torch.stack([policy.weights(pair) for pair in counts]) if labels else policy.weights(counts)


def _warn_of_absent(counts: Counts, weights: Tensor) -> None:
    absent = (torch.as_tensor(counts, device="cpu") == 0).nonzero().tolist()
    if absent:
        names = ", ".join(f"{index}{''.join(f' ({_HOLDS[each]})' for each in holds)}" for index, *holds in absent)
        rank_zero_warn(
            f"No training example of class {names}: it gets the largest weight of the others, {weights.max():.3g}. "
            "Check the labels and the split."
        )


def _require_shapes(logits: Tensor, targets: Tensor, classes: int) -> None:
    if logits.ndim < 2 or logits.shape[1] != classes or not logits.is_floating_point():
        raise MisconfigurationError(
            f"`logits` must be floating, of shape (N, {classes}, ...), since `weigh_classes` got {classes} counts; "
            f"got {logits.dtype} of shape {tuple(logits.shape)}."
        )
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1] + logits.shape[2:]:
        raise MisconfigurationError(
            f"`targets` must be torch.int64 class indices of shape {(*logits.shape[:1], *logits.shape[2:])}, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}."
        )


def _require_label_shapes(logits: Tensor, targets: Tensor, labels: int) -> None:
    if logits.ndim != 2 or logits.shape[1] != labels or not logits.is_floating_point():
        raise MisconfigurationError(
            f"`logits` must be floating, of shape (N, {labels}), since `weigh_classes` got counts of {labels} labels; "
            f"got {logits.dtype} of shape {tuple(logits.shape)}."
        )
    if targets.dtype != torch.int64 or targets.shape != logits.shape:
        raise MisconfigurationError(
            f"`targets` must be 0 or 1, torch.int64, of shape {tuple(logits.shape)}, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}: call `.long()` on labels that hold or not."
        )


def _require_classes(targets: Tensor, classes: int, ignore_index: int) -> None:
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)]
    if len(wrong):
        raise DataError(
            f"target {int(wrong[0])} is no class: there are {classes}, so targets are 0 to {classes - 1}, or "
            f"{ignore_index} to be ignored. Check the labels, or give `weigh_classes` a count for each class."
        )
