"""A copy of all that training changes on this rank, and the way back to it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Moments", "Snapshot", "copy_buffers", "moments_of", "put_moments"]


class Moments(NamedTuple):
    """What an optimizer knows: the state of each parameter that it has stepped, and each group's options."""

    states: list[tuple[Tensor, dict[str, Any]]]
    options: list[dict[str, Any]]


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
    optimizers: tuple[Moments, ...]


def moments_of(optimizer: Optimizer) -> Moments:
    """Copies of the state of each parameter, and of the groups' options.

    The state is gone through by its own keys: ZeRO-3 puts its flat pieces into the groups within a step only.
    """
    states = [
        (own, {key: _copy(value) for key, value in state.items()}) for own, state in optimizer.state.items() if state
    ]
    groups = optimizer.param_groups
    return Moments(states, [{key: _copy(value) for key, value in group.items() if key != "params"} for group in groups])


def put_moments(optimizer: Optimizer, saved: Moments) -> None:
    """Put the copies back, into the same tensors, of which others may hold views."""
    for group, options in zip(optimizer.param_groups, saved.options, strict=True):
        group.update({key: _copy(value) for key, value in options.items()})
    kept = {id(own) for own, _ in saved.states}
    for own in [own for own in optimizer.state if id(own) not in kept]:
        del optimizer.state[own]  # as before its first step
    for own, state in saved.states:
        for key, value in state.items():
            _put(optimizer.state[own], key, value)


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
