"""One copy of fp32 weights under ZeRO: the masters lie where the parameters do."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["share_memory"]


def share_memory(optimizer: Any, stage: int) -> None:
    """Let the master weights of a fp32 model be the memory of its parameters: 4 bytes less for each that it updates.

    DeepSpeed updates flat masters and copies them into the parameters, which as a rule are of lower precision. Where
    they are fp32 too, that is a second copy of the same values. (Stage 3 means to leave it out, but compares a device
    with the name of one.) The masters stay the tensors that the optimizer and its state know; only their memory
    changes. Masters of another dtype, or on another device, stay as they are.

    Args:
        optimizer: ZeRO's own, before its first step.
        stage: 1, 2 or 3.
    """
    shared = [_share(master, part) for master, part in (_stage_three if stage == 3 else _stages_one_and_two)(optimizer)]
    if any(shared) and stage < 3:
        optimizer._link_all_hp_params()  # each parameter has a view of its master


def _stages_one_and_two(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    ranks = [torch.distributed.get_rank(group) for group in optimizer.real_dp_process_group]
    parts = [of_ranks[rank] for of_ranks, rank in zip(optimizer.parallel_partitioned_bit16_groups, ranks, strict=True)]
    return zip(optimizer.single_partition_of_fp32_groups, parts, strict=True)


def _stage_three(optimizer: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    return zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)


def _share(master: Tensor, part: Tensor | None) -> bool:
    if part is None or (part.dtype, part.device, part.shape) != (master.dtype, master.device, master.shape):
        return False
    master.data = part.data
    return True
