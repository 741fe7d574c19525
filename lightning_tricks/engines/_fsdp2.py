"""FSDP2: each parameter and its gradient is a DTensor, cut along its first dimension."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._base import Entry
from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._plain import PlainEngine
from lightning_tricks.storage import WeightsFile

__all__ = ["FSDP2Engine", "place"]


class FSDP2Engine(PlainEngine):
    """The engine of `fsdp2` and of Lightning's `ModelParallelStrategy`. Sharded parameters are the masters."""

    def _state_keys(self) -> list[str]:
        self._reshard()
        return super()._state_keys()

    def _trained(self) -> list[Entry]:
        self._reshard()
        return super()._trained()

    def _reshard(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation may have left whole parameters behind

    def _whole(self, tensor: Any) -> Tensor:
        full: Tensor = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return full

    def _write(self, entry: Entry, file: WeightsFile) -> None:
        tensor: Any = entry.tensor
        if not hasattr(tensor, "to_local"):
            tensor.copy_(file.tensor(entry.name))
            return
        shape, offset = place(tensor)
        if not shape:
            tensor.to_local().copy_(file.tensor(entry.name))
            return
        rows = file.rows(entry.name, offset[0], offset[0] + shape[0])
        inner = [slice(start, start + size) for start, size in zip(offset[1:], shape[1:], strict=True)]
        tensor.to_local().copy_(rows[(slice(None), *inner)])

    def _part(self, entry: Entry) -> tuple[Tensor, int] | None:
        tensor: Any = entry.tensor
        if not hasattr(tensor, "to_local"):
            return super()._part(entry)
        shape, offset = place(tensor)
        whole = tuple(tensor.shape)
        strided = any("Strided" in type(placement).__name__ for placement in tensor.placements)
        if 0 not in shape and (strided or shape[1:] != whole[1:]):
            raise refusal("tensor_parallel", name=entry.name)
        return tensor.detach().to_local().reshape(-1), offset[0] * math.prod(whole[1:]) if shape else 0

    def _put(self, entry: Entry, values: Tensor) -> None:
        tensor: Any = entry.tensor
        local = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor
        local.copy_(values.reshape(local.shape))


def place(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a DTensor, and where in the whole it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in shape:  # a rank without a part: its offset may lie beyond the end
        offset = torch.Size([0] * len(shape))
    return tuple(shape), tuple(offset)
