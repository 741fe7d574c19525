"""Normalisations of a frozen base that keep the statistics it was trained with."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["keep_norms_still"]


def keep_norms_still(module: nn.Module) -> None:
    """Put batch normalisations in evaluation mode if nothing in them is trained: their statistics are frozen as well.

    Otherwise the base would move in training, while files with the adapter alone, and what recognises a base by its
    weights, know nothing of it.

    Args:
        module: a base, frozen but for adapters and some parts.
    """
    for norm in module.modules():
        if isinstance(norm, _NormBase) and not any(p.requires_grad for p in norm.parameters()):
            norm.eval()
