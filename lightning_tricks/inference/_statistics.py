"""Running statistics of normalisations for weights that none were ever computed with."""

import copy
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_tricks.engines import Stored
from lightning_tricks.errors import DataError, DegradedWarning, MisconfigurationError

__all__ = ["checked_source", "running_statistics", "statistics_names", "warn_of_averaged_statistics"]

_NAMES = ("running_mean", "running_var")


def statistics_names(stored: Stored) -> list[str]:
    """The names of running means and variances."""
    return [name for name in stored.weights if name.rpartition(".")[2] in _NAMES]


def warn_of_averaged_statistics(name: str) -> None:
    """Say that a mean of statistics belongs to no weights."""
    warnings.warn(
        f"`{name}` and other running statistics are averaged, which are not those of the averaged weights: pass"
        " `module=` and `loader=` to compute them from data.",
        DegradedWarning,
        stacklevel=4,
    )


def running_statistics(module: nn.Module, stored: Stored, loader: Iterable[Any], batches: int) -> dict[str, Tensor]:
    """The statistics that the weights of a checkpoint give on some batches, as `torch.optim.swa_utils.update_bn`.

    Unlike there, only the normalisations are in training mode: dropout is off, as when the weights are used.

    Args:
        module: a module that takes the weights; a copy of it is used.
        stored: the weights.
        loader: batches; those that are tuples or lists give the module their first entry.
        batches: the most to take.

    Returns:
        The running means, variances and counts by name.
    """
    own = copy.deepcopy(module)
    own.load_state_dict({name: stored.tensor(name) for name in stored.weights})
    norms = {n: part for n, part in own.named_modules() if isinstance(part, _NormBase) and part.track_running_stats}
    own.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    taken = 0
    with torch.no_grad():
        for batch in islice(loader, batches):
            own(batch[0] if isinstance(batch, tuple | list) else batch)
            taken += 1
    if not taken:
        raise DataError("`loader` gave no batch to compute running statistics from: pass one with data.")
    found = {f"{name}." if name else "": dict(norm.named_buffers(recurse=False)) for name, norm in norms.items()}
    return {prefix + name: value for prefix, buffers in found.items() for name, value in buffers.items()}


def checked_source(module: nn.Module | None, loader: object, batches: int) -> None:
    """Refuse data without a module to run on them, and a number of batches that is none."""
    if loader is not None and module is None:
        raise MisconfigurationError("`loader` is given without `module`: pass the module that computes on its batches.")
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise MisconfigurationError(f"`batches` must be a whole number of 1 or more, got {batches!r}: try 100.")
