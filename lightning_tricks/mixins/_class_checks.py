"""What is looked at before class weights are taken, and before a loss is computed with them."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.class_weights import checked_weights
from lightning_tricks.mixins._class_losses import ClassLoss, balances
from lightning_tricks.mixins._class_weights import ClassWeights, ExplicitWeights

__all__ = ["Counts", "class_fault", "require_shapes", "warn_of_absent", "warn_of_two", "weights_of"]

Counts = Sequence[int] | Sequence[Sequence[int]] | Tensor
_HOLDS = ("no", "yes")  # of a label


def weights_of(counts: Any, policy: ClassWeights) -> Tensor:
    """The weights by a rule, fp32, of shape (K,), or (K, 2) for labels.

    Raises:
        MisconfigurationError: if a rule, also one of a user's own, gives none, or too few, or they are not above 0.
    """
    if not _are_of_labels(counts):
        return _by_rule(policy, counts)
    if isinstance(policy, ExplicitWeights):
        return policy.of_labels(len(counts))
    return torch.stack([_by_rule(policy, pair) for pair in counts])


def _are_of_labels(counts: Any) -> bool:
    try:
        shape = torch.as_tensor(counts, device="cpu").shape
    except (TypeError, ValueError, RuntimeError):  # no numbers, or ragged: the policy says so
        return False
    if len(shape) == 2 and shape[1] != 2:
        raise MisconfigurationError(
            f"`counts` of labels must be of shape (K, 2), the examples without and with each, got {tuple(shape)}."
        )
    return len(shape) == 2


def _by_rule(policy: ClassWeights, counts: Any) -> Tensor:
    with torch.device("cpu"):  # where an engine builds the module elsewhere
        weights = policy.weights(counts)
    try:
        return checked_weights(weights, len(counts))
    except MisconfigurationError as error:
        raise MisconfigurationError(f"{type(policy).__name__}.weights gave what are no weights: {error}") from error


def warn_of_absent(counts: Counts, weights: Tensor) -> None:
    """Say which classes have no example, once their counts are known to be such.

    Raises:
        DataError: if one class has them all.
    """
    found = torch.as_tensor(counts, device="cpu")
    if found.ndim == 1 and int((found > 0).sum()) == 1:
        raise DataError(
            f"all {int(found.sum())} training examples are of class {int(found.argmax())}: there is nothing to tell "
            "apart. Check the labels and the split."
        )
    absent = (found == 0).nonzero().tolist()
    if absent:
        names = ", ".join(f"{index}{''.join(f' ({_HOLDS[each]})' for each in holds)}" for index, *holds in absent)
        rank_zero_warn(
            f"No training example of class {names}: it gets the largest weight of the others, {weights.max():.3g}. "
            "Check the labels and the split."
        )


def warn_of_two(policy: ClassWeights, weights: Tensor, loss: ClassLoss) -> None:
    """Say that weights and a loss that both correct the imbalance correct it twice."""
    if balances(loss) and bool((weights != weights.flatten()[0]).any()):
        rank_zero_warn(
            f"{loss!r} corrects the imbalance by itself, and {type(policy).__name__} once more: rare classes count "
            "twice over. Leave the weights out, unless that is meant."
        )


def require_shapes(logits: Tensor, targets: Tensor, weights: Tensor) -> None:
    """Refuse logits and targets that do not fit the weights or each other.

    Raises:
        MisconfigurationError: naming the shape and type that were expected, and those found.
    """
    if weights.ndim == 2:
        _require_label_shapes(logits, targets, len(weights))
    else:
        _require_class_shapes(logits, targets, len(weights))


def _require_class_shapes(logits: Tensor, targets: Tensor, classes: int) -> None:
    single = classes == 2 and logits.ndim == 1
    fits = single or (logits.ndim >= 2 and logits.shape[1] == classes)
    if not fits or not logits.is_floating_point():
        raise MisconfigurationError(
            f"`logits` must be floating, of shape (N, {classes}, ...){' or (N,)' if classes == 2 else ''}, since "
            f"`weigh_classes` got {classes} counts; got {logits.dtype} of shape {tuple(logits.shape)}."
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


def class_fault(targets: Tensor, weights: Tensor, ignore_index: int) -> DataError | None:
    """The error that names the first target that is no class, and its place; None if there is none."""
    classes = weights.shape[-1]
    wrong = (((targets < 0) | (targets >= classes)) & (targets != ignore_index)).nonzero()
    if not len(wrong):
        return None
    sample, *place = wrong[0].tolist()
    where = f"sample {sample} of the batch" + (f", at {', '.join(map(str, place))}," if place else "")
    remedy = "give `weigh_classes` a count for each class" if weights.ndim == 1 else "pass 1 for one that holds, else 0"
    return DataError(
        f"{where} has the target {int(targets[tuple(wrong[0])])}, which is no class: there are {classes}, so targets "
        f"are 0 to {classes - 1}, or {ignore_index} to be ignored. Check the labels, or {remedy}."
    )
