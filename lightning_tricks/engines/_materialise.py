"""First values for a sharded module on the meta device: one layer whole at a time, its shards kept."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.engines._fsdp2 import place
from lightning_tricks.errors import MisconfigurationError

__all__ = ["materialise", "refuse_without_values"]


def refuse_without_values(module: nn.Module) -> None:
    """Refuse a module with layers on the meta device that do not say what their values are at first.

    Raises:
        MisconfigurationError: naming the first such layer.
    """
    for name, part in module.named_modules():
        if _on_meta(part) and not callable(getattr(part, "reset_parameters", None)):
            where = f"`{name}` ({type(part).__name__})" if name else type(part).__name__
            raise MisconfigurationError(
                f"{where} has a parameter or buffer on the meta device and no `reset_parameters()` that gives it"
                " values: write that method, or create this layer outside of `torch.device('meta')`."
            )


def materialise(module: nn.Module, device: torch.device, shards_on: torch.device) -> None:
    """Give what is on the meta device its values by each layer's `reset_parameters()`, as it would have them unsharded.

    Rank 0's values are everyone's. Layers follow one another as in `modules()`, so that a seed gives the values that it
    gives on one device. A tied weight gets those of the first layer that has it. Collective.

    Args:
        module: sharded already; its shards on the meta device are found by `refuse_without_values` to have values.
        device: where buffers go, and a whole layer while it gets its values.
        shards_on: where shards go.
    """
    for part in module.modules():
        if _on_meta(part):
            _materialise(part, device, shards_on)


def _materialise(part: Any, device: torch.device, shards_on: torch.device) -> None:
    new = {name for name, tensor in _own(part) if tensor.is_meta}
    for name, buffer in part._buffers.items():
        if name in new:
            part._buffers[name] = torch.empty_like(buffer, device=device)
    part._apply(lambda tensor: torch.empty_like(tensor, device=shards_on) if tensor.is_meta else tensor, recurse=False)
    for name, value in _first_values(part, device).items():
        if name in new:
            torch.distributed.broadcast(value, 0)
            _keep(part._parameters.get(name, part._buffers.get(name)), value)


def _first_values(part: Any, device: torch.device) -> dict[str, Tensor]:
    """What `reset_parameters()` makes of whole tensors in the place of the layer's own, which stay as they are."""
    parameters, buffers = dict(part._parameters), dict(part._buffers)
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in _own(part)}
    part._parameters.update({name: nn.Parameter(empty[name], False) for name in parameters if name in empty})
    part._buffers.update({name: empty[name] for name in buffers if name in empty})
    try:
        part.reset_parameters()
        return {name: tensor.detach().contiguous() for name, tensor in _own(part)}
    finally:
        part._parameters.update(parameters)
        part._buffers.update(buffers)


def _keep(tensor: Any, value: Tensor) -> None:
    with torch.no_grad():
        if not hasattr(tensor, "to_local"):
            tensor.copy_(value)
            return
        shape, offset = place(tensor)
        if shape:
            own = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
            tensor.to_local().copy_(value[own])


def _own(part: nn.Module) -> list[tuple[str, Tensor]]:
    """The layer's own parameters and buffers, without those of the layers in it."""
    return list(chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False)))


def _on_meta(part: nn.Module) -> bool:
    return any(tensor.is_meta for _, tensor in _own(part))
