"""Parameters that a ZeRO step passes by: whole flat pieces, and gradients that count for nothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._zero_parts import is_offloaded, parts
from lightning_tricks.errors import MisconfigurationError

__all__ = ["silence", "whole_pieces"]


def whole_pieces(optimizer: Any, stage: int, parameters: Sequence[Tensor]) -> set[int]:
    """The numbers of the flat pieces that these parameters make up. The same on every rank.

    Raises:
        MisconfigurationError: if they are only a part of one: it is stepped as a whole, with one count of its steps.
    """
    chosen = {id(parameter) for parameter in parameters}
    found = set()
    for index, group in enumerate(optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups):
        inside = [id(parameter) in chosen for parameter in group]
        if any(inside) and not all(inside):
            raise MisconfigurationError(
                f"{sum(inside)} of the {len(inside)} parameters of group {index} are to be left out of a step, and ZeRO"
                " steps a group in one piece: give them a parameter group of their own."
            )
        found |= {index} if any(inside) else set()
    return found


def silence(optimizer: Any, stage: int, parameters: Sequence[Tensor]) -> None:
    """Let the gradients of these parameters count as zero, in this window, wherever the step looks for a norm."""
    if getattr(optimizer, "swap_optimizer", False):
        raise refusal("nvme_left_out")
    chosen = {id(parameter) for parameter in parameters}
    gradients = [part.gradient for part in parts(optimizer, stage) if id(part.parameter) in chosen]
    if gradients:
        torch._foreach_zero_(gradients)
    if is_offloaded(optimizer, stage):
        norms = optimizer.norm_for_param_grads
        for parameter in parameters:
            key = optimizer.get_param_id(parameter)
            if key in norms:
                norms[key] = torch.zeros_like(torch.as_tensor(norms[key]))
