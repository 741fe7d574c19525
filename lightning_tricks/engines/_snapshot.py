"""A copy of all that training changes on this rank, and the way back to it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Snapshot", "copy_buffers", "moments_of", "put_moments"]


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of the training state at one moment, in the memory of the devices that hold it.

    Args:
        weights: this rank's parts of the masters, by name.
        buffers: the module's buffers, by name.
        optimizers: the moments, step counts and options of each optimizer.
    """

    weights: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    optimizers: tuple[Any, ...]


def moments_of(optimizer: Optimizer) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Copies of the state of each parameter of each group, and of the groups' options."""
    states = [
        [{key: _copy(value) for key, value in optimizer.state.get(own, {}).items()} for own in group["params"]]
        for group in optimizer.param_groups
    ]
    options = [
        {key: _copy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return states, options


def put_moments(optimizer: Optimizer, saved: tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Put the copies back, into the same tensors, of which others may hold views."""
    for group, states, options in zip(optimizer.param_groups, *saved, strict=True):
        group.update({key: _copy(value) for key, value in options.items()})
        for own, state in zip(group["params"], states, strict=True):
            if not state:
                optimizer.state.pop(own, None)  # as before its first step
                continue
            present = optimizer.state[own]
            for key, value in state.items():
                _put(present, key, value)


def _put(state: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
        _local(state[key]).copy_(value)
    else:
        state[key] = _copy(value)


def _copy(value: Any) -> Any:
    return _local(value).detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def copy_buffers(buffers: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Write buffers back, in place."""
    with torch.no_grad():
        for name, value in saved.items():
            buffers[name].copy_(value)
