"""Values beside the master shards, such as averages: to one file and back, on any number of ranks."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_tricks.engines._ranks import gather_over_ranks, ranks, sum_over_ranks
from lightning_tricks.engines._shards import Shard

__all__ = ["named_wholes", "rounded"]

Place = tuple[int, int]


def rounded(values: Mapping[str, Tensor]) -> str | None:
    """The first value that single precision would not hold exactly; None if there is none.

    Example:
        >>> rounded({"w": torch.zeros(1, dtype=torch.float64)})
        '`w` is torch.float64, and the file holds torch.float32'
    """
    held = (torch.float32, torch.float16, torch.bfloat16)
    found = [f"`{name}` is {value.dtype}" for name, value in values.items() if value.dtype not in held]
    return f"{found[0]}, and the file holds torch.float32" if found else None


def named_wholes(
    shards: Sequence[Shard], values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors that all ranks' values make up, one at a time, in fp32, on the CPU. Collective.

    They are added up as integers, each element with zeros: no bit changes, not even the sign of a zero.

    Args:
        shards: this rank's.
        values: for each of them, as many elements.
        shapes: of all wholes, in the order wanted.
        device: where this rank communicates.
    """
    own = {shard.name: (shard.start, shard.stop) for shard in shards}
    places = gather_over_ranks(own)
    rank = ranks()[0]
    for name, shape in shapes.items():
        givers = _givers(name, places)
        whole = torch.zeros(torch.Size(shape).numel(), dtype=torch.int32, device=device)
        if rank in givers:
            start, stop = own[name]
            whole[start:stop] = values[name].detach().reshape(-1).to(device, torch.float32).view(torch.int32)
        alone = givers == [0]  # who writes holds it all: as under DDP
        yield name, (whole if alone else sum_over_ranks(whole, device)).view(torch.float32).view(shape).cpu()


def _givers(name: str, places: Sequence[Mapping[str, Place]]) -> list[int]:
    """Of the ranks that hold the same part, which are replicas of each other, the first."""
    first: dict[Place, int] = {}
    for rank, held in enumerate(places):
        if name in held:
            first.setdefault(held[name], rank)
    return list(first.values())
