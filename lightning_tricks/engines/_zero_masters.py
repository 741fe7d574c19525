"""One copy of fp32 weights under ZeRO: the masters lie where the parameters do."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._zero_step import private

__all__ = ["PRIVATE", "share_memory"]

# What an optimizer of each stage must have, built: the parts of the parameters that this rank updates, their masters.
PRIVATE = {
    1: ("parallel_partitioned_bit16_groups", "real_dp_process_group", "single_partition_of_fp32_groups"),
    3: ("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
}
PRIVATE[2] = PRIVATE[1]


def share_memory(optimizer: Any, stage: int) -> None:
    """Let the master weights of a fp32 model be the memory of its parameters: 4 bytes less for each that it updates.

    DeepSpeed updates flat masters and copies them into the parameters, which as a rule are of lower precision. Where
    they are fp32 too, that is a second copy of the same values. (Stage 3 means to leave it out, but compares a device
    with the name of one.) The masters stay the tensors that the optimizer and its state know; only their memory
    changes. Masters of another dtype, or on another device, stay as they are.

    Args:
        optimizer: ZeRO's own, before its first step.
        stage: 1, 2 or 3.

    Raises:
        UnsupportedError: if this DeepSpeed keeps them elsewhere.
    """
    masters, parts = (_stage_three if stage == 3 else _stages_one_and_two)(
        *(private(optimizer, name) for name in PRIVATE[stage])
    )
    shared = [_share(master, part) for master, part in zip(masters, parts, strict=True)]
    if any(shared) and stage < 3:
        private(optimizer, "_link_all_hp_params")()  # each parameter has a view of its master


def _stage_three(parts: Iterable[Tensor], masters: Iterable[Tensor]) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
    return masters, parts


def _stages_one_and_two(
    parts: Iterable[list[Tensor]], groups: Iterable[Any], masters: Iterable[Tensor]
) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
    ranks = (torch.distributed.get_rank(group) for group in groups)
    return masters, [of_ranks[rank] for of_ranks, rank in zip(parts, ranks, strict=True)]


def _share(master: Tensor, part: Tensor | None) -> bool:
    if part is None or (part.dtype, part.device, part.shape) != (master.dtype, master.device, master.shape):
        return False
    master.data = part.data
    return True
