"""The arithmetic of low-rank adaptation."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["low_rank_update"]


def low_rank_update(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """What a low-rank adapter adds to the output of a linear layer: `scale * (x @ down.T) @ up`.

    The adapter is cast to the precision of `x`: two small matrices instead of the activations.

    Args:
        x: inputs of shape (..., in_features).
        down: the first factor, `A` in the paper, of shape (rank, in_features).
        up: the second factor, the transpose of the paper's `B`, of shape (rank, out_features): stored that way, the
            product that gives its gradient reads both operands in the order of memory.
        scale: `alpha / rank` in the paper.

    Returns:
        A tensor of shape (..., out_features).

    Example:
        >>> import torch
        >>> from lightning_tricks.functional import low_rank_update
        >>> low_rank_update(torch.ones(1, 3), down=torch.ones(2, 3), up=torch.ones(2, 4), scale=0.5)
        tensor([[3., 3., 3., 3.]])

    References:
        Hu et al.: LoRA: Low-rank adaptation of large language models (ICLR 2022).
    """
    narrow = F.linear(x, down.to(x.dtype)) * scale
    return F.linear(narrow, up.to(narrow.dtype).t())
