"""What a loss is divided by: tokens, sequences, or a fixed maximum length. Each as a sum and a count."""

import torch
from torch import Tensor

from lightning_tricks.errors import MisconfigurationError

__all__ = ["per_maximum_length", "per_sequence", "per_token"]


def per_token(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Every token counts the same, so that long sequences count for more.

    Args:
        losses: of each token, of shape (B, T), floating; what is masked may be anything, NaN included.
        mask: true for tokens that count, of shape (B, T).

    Returns:
        The sum of the losses, fp32 (with gradient), and the number of tokens, int64; both zero-dimensional.

    Raises:
        MisconfigurationError: if the shapes differ, or are not (B, T).

    Example:
        >>> losses, mask = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> per_token(losses, mask)
        (tensor(12.), tensor(4))
    """
    kept, valid = _kept(losses, mask)
    return kept.sum(), valid.sum()


def per_sequence(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Every sequence counts the same: its loss is the mean over its own tokens.

    Args:
        losses: as for `per_token`.
        mask: as for `per_token`.

    Returns:
        The sum of the sequences' means, fp32 (with gradient), and the number of sequences with a token that counts.

    Raises:
        MisconfigurationError: if the shapes differ, or are not (B, T).

    Example:
        >>> losses, mask = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> per_sequence(losses, mask)
        (tensor(8.), tensor(2))
    """
    kept, valid = _kept(losses, mask)
    lengths = valid.sum(1)
    return (kept.sum(1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()


def per_maximum_length(losses: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Every sequence's sum is divided by the same length, so that a token counts the same in whatever batch it is.

    Args:
        losses: as for `per_token`.
        mask: as for `per_token`.
        length: tokens, above 0: the longest that a sequence of the data may be. Not that of a batch, which differs
            from rank to rank.

    Returns:
        The sum of the losses over `length`, fp32 (with gradient), and the number of sequences with a token that counts.

    Raises:
        MisconfigurationError: if the shapes differ, or are not (B, T), or `length` is not a whole number above 0.

    Example:
        >>> losses, mask = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> per_maximum_length(losses, mask, 4)
        (tensor(3.), tensor(2))
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise MisconfigurationError(
            f"`length` must be a whole number of tokens above 0, got {length!r}: the longest that a sequence may be."
        )
    kept, valid = _kept(losses, mask)
    return kept.sum() / length, valid.any(1).sum()


def _kept(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if losses.ndim != 2 or mask.shape != losses.shape:
        raise MisconfigurationError(
            f"`losses` and `mask` must have the same shape (sequences, tokens), got {tuple(losses.shape)} and "
            f"{tuple(mask.shape)}: use `reduction='none'`, and reshape to that."
        )
    valid = mask.bool()
    return torch.where(valid, losses.float(), 0.0), valid
