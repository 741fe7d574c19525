"""Batch normalisation at mixed precision: torch takes low-precision inputs, but no low-precision weights beside fp32.

Autocast leaves weights and statistics in fp32. FSDP2 and DeepSpeed make the weights low-precision, not the statistics.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["normalisations_with_statistics", "normalise_in_fp32"]

_WEIGHTS = ("weight", "bias")


def normalisations_with_statistics(module: nn.Module) -> list[nn.Module]:
    """The normalisations that have both weights and running statistics.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2))
        >>> [type(norm).__name__ for norm in normalisations_with_statistics(net)]
        ['BatchNorm1d']
    """
    norms = (part for part in module.modules() if isinstance(part, _NormBase))
    return [norm for norm in norms if norm.weight is not None and norm.running_mean is not None]


def normalise_in_fp32(module: nn.Module) -> None:
    """Let these normalisations compute with fp32 copies of their weights, as under autocast. Gradients flow through.

    Call it after DeepSpeed has put its own hooks: at stage 3 they gather the weights.
    """
    for norm in normalisations_with_statistics(module):
        norm.register_forward_pre_hook(_lend_fp32)
        norm.register_forward_hook(_take_back, prepend=True, always_call=True)  # before stage 3 lets go of them


def _lend_fp32(norm: Any, *_: Any) -> None:
    own = {name: getattr(norm, name) for name in _WEIGHTS}
    if own["weight"].dtype == torch.float32:
        return
    vars(norm)["_own_weights"] = own
    for name, parameter in own.items():
        norm._parameters[name] = parameter.float()


def _take_back(norm: Any, *_: Any) -> None:
    for name, parameter in vars(norm).pop("_own_weights", {}).items():
        norm._parameters[name] = parameter
