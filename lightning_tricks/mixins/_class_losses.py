"""What loss the class weights weigh."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import class_loss_sums, weighted_cross_entropy_sums

__all__ = ["ClassLoss", "CrossEntropy", "Focal", "LogitAdjusted", "balances"]


class ClassLoss(Protocol):
    """A loss as two sums, whose quotient is its mean. One of your own is a class with this method.

    If it corrects the imbalance of classes by itself, it says so by an attribute `balances = True`: it then gets equal
    weights unless others are asked for, and a sampler or weights that correct once more are told of.
    """

    def sums(
        self, logits: Tensor, targets: Tensor, weights: Tensor, prior: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the targets' losses, and the sum of their weights; both fp32, zero-dimensional.

        Args:
            logits: scores of shape (N, K, ...).
            targets: class indices of shape (N, ...), or `ignore_index`.
            weights: of the classes, of shape (K,), or (L, 2) for L labels of two classes each.
            prior: the logarithm of each class's share of the training set, of the weights' shape; outside training 0.
            ignore_index: the target that counts for nothing.
        """
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy, as torch defines it with weights and label smoothing.

    Args:
        label_smoothing: the share of each target that is spread over all classes, in [0, 1); 0.1 is usual.

    Example:
        >>> from lightning_tricks.mixins import CrossEntropy
        >>> CrossEntropy(label_smoothing=0.1)
        CrossEntropy(label_smoothing=0.1)

    References:
        Szegedy et al.: Rethinking the Inception architecture for computer vision (CVPR 2016).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise MisconfigurationError(
                f"`label_smoothing` must be 0 or more and below 1, got {self.label_smoothing!r}: 0.1 is usual."
            )

    def sums(
        self, logits: Tensor, targets: Tensor, weights: Tensor, prior: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the targets' losses, and the sum of their weights."""
        if weights.ndim == 1:
            return weighted_cross_entropy_sums(
                logits, targets, weights, ignore_index=ignore_index, label_smoothing=self.label_smoothing
            )
        if self.label_smoothing:
            raise MisconfigurationError(
                f"label smoothing is for classes, not for labels of two each: leave label_smoothing="
                f"{self.label_smoothing!r} out, or give the labels as classes."
            )
        return class_loss_sums(logits, targets, weights, ignore_index=ignore_index)


@dataclass(frozen=True)
class Focal:
    """The focal loss: a target of probability p counts `(1 - p) ** gamma`, so that easy ones count little.

    The mean is taken over the targets' weights, as of a cross-entropy; with `gamma=0` it is that cross-entropy.

    Args:
        gamma: 0 or more; 2 is usual.

    Example:
        >>> from lightning_tricks.mixins import Focal
        >>> Focal(gamma=2.0)
        Focal(gamma=2.0)

    References:
        Lin et al.: Focal loss for dense object detection (ICCV 2017).
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise MisconfigurationError(f"`gamma` must be finite and 0 or more, got {self.gamma!r}: 2 is usual.")

    def sums(
        self, logits: Tensor, targets: Tensor, weights: Tensor, prior: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the targets' losses, and the sum of their weights."""
        return class_loss_sums(logits, targets, weights, gamma=self.gamma, ignore_index=ignore_index)


@dataclass(frozen=True)
class LogitAdjusted:
    """Cross-entropy of logits to which the classes' prior is added: the model learns scores for balanced classes.

    The prior is added within the training loss only: what the module's `forward` gives is not adjusted, and its largest
    score is the decision that errs least over balanced classes. So validation's loss is the cross-entropy of those
    plain scores. It corrects the imbalance by itself, and gets equal weights unless others are asked for.

    Args:
        tau: how much of the prior is added, 0 or more; 1 is consistent with the balanced error.

    Example:
        >>> from lightning_tricks.mixins import LogitAdjusted
        >>> LogitAdjusted(tau=1.0)
        LogitAdjusted(tau=1.0)

    References:
        Menon et al.: Long-tail learning via logit adjustment (ICLR 2021).
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.tau < float("inf"):
            raise MisconfigurationError(f"`tau` must be finite and 0 or more, got {self.tau!r}: 1 is usual.")

    @property
    def balances(self) -> bool:
        """Whether it corrects the imbalance by itself."""
        return self.tau > 0

    def sums(
        self, logits: Tensor, targets: Tensor, weights: Tensor, prior: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the targets' losses, and the sum of their weights."""
        return class_loss_sums(logits, targets, weights, offset=self.tau * prior, ignore_index=ignore_index)


def balances(loss: ClassLoss) -> bool:
    """Whether a loss says that it corrects the imbalance of classes by itself.

    Example:
        >>> from lightning_tricks.mixins._class_losses import Focal, LogitAdjusted, balances
        >>> balances(LogitAdjusted()), balances(Focal())
        (True, False)
    """
    return bool(getattr(loss, "balances", False))
