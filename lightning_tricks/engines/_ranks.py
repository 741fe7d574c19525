"""Which process this is, and what the others hold, with or without a Trainer."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["broadcast_from_rank_zero", "gather_over_ranks", "ranks", "sum_over_ranks"]

T = TypeVar("T")


def ranks() -> tuple[int, int]:
    """This process's rank and the number of processes, from the live process group; (0, 1) without one.

    Example:
        >>> ranks()
        (0, 1)
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sum_over_ranks(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over all ranks as a new tensor on the tensor's own device. `device` is where this rank communicates."""
    if ranks()[1] == 1:
        return tensor.detach().clone()
    total = tensor.detach().to(device, copy=True).contiguous()
    torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def broadcast_from_rank_zero(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give all ranks rank 0's values, in place. Those on the meta device have none. `device` is as above."""
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.is_meta:
                moved = tensor.detach().to(device).contiguous()
                torch.distributed.broadcast(moved, 0)
                tensor.copy_(moved)


def gather_over_ranks(value: T) -> list[T]:
    """The (picklable, small) `value` of each rank, in the order of ranks. Collective.

    Example:
        >>> gather_over_ranks({"rows": 3})
        [{'rows': 3}]
    """
    values = [value] * ranks()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values
