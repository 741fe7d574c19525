"""Hybrid sharding: which ranks share the shards of one copy of the model, and which hold the same shard of another."""

from typing import Any, Literal

import torch

from lightning_tricks.errors import MisconfigurationError

__all__ = ["Replicas", "count_replicas", "refuse_replicas", "sharding_mesh"]

Replicas = int | Literal["nodes"]


def refuse_replicas(value: object) -> None:
    """Refuse any value of the option but `"nodes"` and a whole number of 1 or more."""
    if value == "nodes" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise MisconfigurationError(
        f"`replicate` must be 'nodes' or a whole number of 1 or more, got {value!r}: 1 shards over all ranks."
    )


def count_replicas(value: Replicas, nodes: int, ranks: int) -> int:
    """The number of copies of the model: that of the machines, or what was asked for.

    Raises:
        MisconfigurationError: if the ranks cannot be divided into as many equal groups.

    Example:
        >>> count_replicas("nodes", nodes=2, ranks=8)
        2
    """
    count = nodes if value == "nodes" else value
    if ranks % count:
        divisors = [str(number) for number in range(1, ranks + 1) if ranks % number == 0]
        raise MisconfigurationError(
            f"`replicate={count}` does not divide the {ranks} ranks into equal groups: choose {' or '.join(divisors)}."
        )
    return count


def sharding_mesh(mesh: Any, replicas: int) -> Any:
    """The mesh to shard over: all ranks in one row, or a row for each copy of the model.

    Ranks are numbered machine by machine, so a row's ranks follow one another: with as many rows as machines, the
    shards of a copy lie on one machine, and what is reduced between machines is one shard of the gradients.

    Args:
        mesh: all ranks, in one dimension.
        replicas: the number of rows; it divides the ranks.
    """
    if replicas == 1:
        return mesh
    from torch.distributed.device_mesh import init_device_mesh

    shape = (replicas, torch.distributed.get_world_size() // replicas)
    return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
