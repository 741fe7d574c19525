"""Class-weighted cross-entropy whose mean is the same however the data are spread over ranks and micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_tricks.engines import Trick
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional import balanced_weights, weighted_cross_entropy_sums
from lightning_tricks.mixins._normalizes_losses import DIVIDED_TWICE, NormalizesLosses
from lightning_tricks.mixins._order import require_before_lightning_module

__all__ = ["Balanced", "ClassWeightedLossMixin"]


@dataclass(frozen=True)
class Balanced:
    """Weights that give every class the same share of the loss: `n / (K * n_c)`.

    Example:
        >>> from lightning_tricks.mixins import Balanced
        >>> Balanced().weights([50, 30, 20])
        tensor([0.6667, 1.1111, 1.6667])

    References:
        King, Zeng: Logistic regression in rare events data (Political Analysis, 2001).
    """

    def weights(self, counts: Sequence[int] | Tensor) -> Tensor:
        """The weight of each class, fp32, given the examples per class in the training set."""
        return balanced_weights(counts)


def _weighs(module: Any) -> bool:
    weights = module._buffers.get("class_weights")
    return weights is not None and (weights.is_meta or bool((weights != weights[0]).any()))


class ClassWeightedLossMixin(NormalizesLosses):
    """Cross-entropy in which rare classes weigh more, exact over ranks and accumulation windows.

    Name it before `LightningModule` among the base classes, call `weigh_classes` in `__init__`, and use
    `class_weighted_loss` in the steps. The weights are the buffer `class_weights`: fp32 at every precision, moved and
    saved with the module.

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_before_lightning_module(cls, ClassWeightedLossMixin)

    def weigh_classes(self, counts: Sequence[int] | Tensor, policy: Balanced = Balanced()) -> None:
        """Set the weights of the classes.

        Args:
            counts: examples per class in the training set (and in no other), of shape (K,).
            policy: how counts become weights.

        Raises:
            MisconfigurationError: if `counts` are not whole numbers of 0 or more, two at least, not all 0.
        """
        weights = policy.weights(counts)
        if absent := [index for index, count in enumerate(counts) if count == 0]:
            rank_zero_warn(
                f"No training example of class {', '.join(map(str, absent))}: it gets the largest weight of the "
                f"others, {weights.max():.3g}. Check the labels and the split."
            )
        self.register_buffer("class_weights", weights)

    def class_weighted_loss(self, logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
        """The weighted mean cross-entropy: the weighted sum over the sum of the weights, of all ranks together.

        In training the mean is that of the whole optimizer step, its micro-batches included, as
        `LossNormalizationMixin.normalized_loss` says: what is logged in the training step, what adds nothing, and that
        the loss or a multiple of it is returned. Under manual optimisation each call is a mean of its own. Without a
        Trainer it equals `F.cross_entropy(..., weight=class_weights)`, but for a batch without a valid target, where
        it is 0. Collective: call it on every rank alike.

        Args:
            logits: scores of shape (N, K, ...), of any floating precision; the loss is computed in fp32.
            targets: class indices, int64, of shape (N, ...), in [0, K) or equal to `ignore_index`.
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
        _require_shapes(logits, targets, len(weights))
        if targets.device.type == "cpu":
            _require_classes(targets, len(weights), ignore_index)
        numerator, denominator = weighted_cross_entropy_sums(logits, targets, weights, ignore_index=ignore_index)
        return self._normalized(numerator, denominator)

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


def _require_classes(targets: Tensor, classes: int, ignore_index: int) -> None:
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)]
    if len(wrong):
        raise DataError(
            f"target {int(wrong[0])} is no class: there are {classes}, so targets are 0 to {classes - 1}, or "
            f"{ignore_index} to be ignored. Check the labels, or give `weigh_classes` a count for each class."
        )
