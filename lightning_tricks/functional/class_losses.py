"""The two sums whose quotient is a class-weighted mean loss: exact over ranks and micro-batches when each is summed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["class_loss_sums", "log_prior", "two_class_logits", "weighted_cross_entropy_sums"]


def weighted_cross_entropy_sums(
    logits: Tensor, targets: Tensor, weights: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the class-weighted mean cross-entropy, as `F.cross_entropy` defines it.

    Their quotient is `F.cross_entropy(logits, targets, weight=weights)`. Over several ranks or micro-batches, the
    exact mean is the sum of the numerators over the sum of the denominators, not a mean of means. Computed in fp32
    whatever the precision of the logits.

    Args:
        logits: scores of shape (N, K, ...), of any floating precision.
        targets: class indices of shape (N, ...), in [0, K) or equal to `ignore_index`.
        weights: one weight per class, of shape (K,), above 0.
        ignore_index: the target that is left out of both sums.
        label_smoothing: the share of a target that is spread over all classes, in [0, 1), as torch defines it.

    Returns:
        The weighted sum of losses (with gradient) and the sum of the weights of the targets (without), both fp32 and
        zero-dimensional. With no valid target both are 0, and the first still has a gradient of zeros.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import weighted_cross_entropy_sums
        >>> logits, targets = torch.zeros(3, 2), torch.tensor([0, 1, -100])
        >>> weighted_cross_entropy_sums(logits, targets, torch.tensor([1.0, 3.0]))
        (tensor(2.7726), tensor(4.))
    """
    with torch.autocast(logits.device.type, enabled=False):
        weights = weights.detach().to(logits.device, torch.float32)
        numerator = F.cross_entropy(
            logits.float(),
            targets,
            weight=weights,
            reduction="sum",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    return numerator, _target_weights(targets, weights, ignore_index).sum()


def class_loss_sums(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    gamma: float = 0.0,
    offset: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The sums of the focal loss, of a cross-entropy with adjusted logits, or of both, in one class or label each.

    Without `gamma` and `offset` they are those of `weighted_cross_entropy_sums`. Computed in fp32.

    Args:
        logits: scores of shape (N, K, ...), of any floating precision.
        targets: class indices of shape (N, ...), in [0, K) or equal to `ignore_index`.
        weights: one weight per class, of shape (K,); or of shape (..., K), for each of the trailing positions its own.
        gamma: 0 or more: a target of probability p counts `(1 - p) ** gamma`, so that easy ones count little.
        offset: added to the logits, of shape (K,) or (..., K): `tau * log_prior(counts)` for logit adjustment.
        ignore_index: the target that is left out of both sums.

    Returns:
        The weighted sum of losses (with gradient) and the sum of the weights of the targets (without), both fp32 and
        zero-dimensional.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import class_loss_sums
        >>> logits, targets = torch.zeros(3, 2), torch.tensor([0, 1, -100])
        >>> class_loss_sums(logits, targets, torch.tensor([1.0, 3.0]), gamma=2.0)
        (tensor(0.6931), tensor(4.))

    References:
        Lin et al.: Focal loss for dense object detection (ICCV 2017).
        Menon et al.: Long-tail learning via logit adjustment (ICLR 2021).
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float() if offset is None else logits.float() + _as_logits(offset, logits)
        valid = targets != ignore_index
        chosen = targets.masked_fill(~valid, 0).unsqueeze(1)
        loss = -scores.log_softmax(1).gather(1, chosen).squeeze(1)
        if gamma:  # at p = 1 the factor is 0, and so is its gradient, which for gamma < 1 would be infinite
            loss = loss * (-torch.expm1(-loss)).clamp_min(torch.finfo(torch.float32).tiny) ** gamma
        of_targets = _target_weights(targets, weights.detach().to(logits.device, torch.float32), ignore_index)
        return (loss.masked_fill(~valid, 0) * of_targets).sum(), of_targets.sum()


def log_prior(counts: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
    """The logarithm of each class's share of the training set, as logit adjustment adds it in training.

    Args:
        counts: examples per class, of shape (K,) or (..., K), not all 0. A class without one counts as if it had one.

    Returns:
        fp32, finite, of the shape of `counts`.

    Example:
        >>> from lightning_tricks.functional import log_prior
        >>> log_prior([75, 25])
        tensor([-0.2877, -1.3863])
    """
    n = torch.as_tensor(counts, device="cpu").to(torch.float64).clamp_min(1)
    return (n / n.sum(-1, keepdim=True)).log().to(torch.float32)


def two_class_logits(logits: Tensor) -> Tensor:
    """Scores of labels that hold or not, of shape (N, ...), as those of two classes, of shape (N, 2, ...).

    The cross-entropy of the two is the binary cross-entropy of the one.

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import two_class_logits
        >>> two_class_logits(torch.zeros(5, 3)).shape
        torch.Size([5, 2, 3])
    """
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def _target_weights(targets: Tensor, weights: Tensor, ignore_index: int) -> Tensor:
    """The weight of each target, of the targets' shape; 0 for those to be ignored."""
    valid = targets != ignore_index
    chosen = targets.masked_fill(~valid, 0)
    if weights.ndim == 1:
        return weights[chosen] * valid
    each = weights.expand(*targets.shape, weights.shape[-1])
    return each.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) * valid


def _as_logits(offset: Tensor, logits: Tensor) -> Tensor:
    """(K,) or (..., K), laid out to be added to logits of shape (N, K, ...)."""
    offset = offset.to(logits.device, torch.float32)
    return offset.view(-1, *(1,) * (logits.ndim - 2)) if offset.ndim == 1 else offset.movedim(-1, 0)
