"""Where in a ZeRO optimizer's flat pieces each parameter's gradient lies, before its step and within it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tricks.engines._capabilities import refusal

__all__ = ["Edit", "Part", "is_offloaded", "paired", "parts", "piece"]

Edit = Callable[[int, Tensor], None]  # given the number of a flat piece, and its unscaled fp32 gradients


class Part(NamedTuple):
    """This rank's stretch of one parameter's gradient.

    Args:
        parameter: the module's own.
        gradient: flat, scaled by the loss scale, in the dtype that gradients add up in.
        weight: the fp32 master of the same stretch, flat.
        start: where in the flattened whole the stretch begins.
        piece: the number of the flat piece that it is stepped in.
        place: where in that piece it begins.
    """

    parameter: Any
    gradient: Tensor
    weight: Tensor
    start: int
    piece: int
    place: int


def parts(optimizer: Any, stage: int) -> list[Part]:
    """Every stretch that this rank steps."""
    if getattr(optimizer, "swap_optimizer", False):
        raise refusal("nvme_gradients")
    found = _partitions(optimizer) if stage == 3 else _fragments(optimizer)
    return [part for part in found if part.gradient.numel()]


def piece(optimizer: Any, stage: int, given: Any) -> tuple[int, Tensor]:
    """The number of the flat piece that DeepSpeed is about to step, and its gradients."""
    if stage == 3:
        return given, optimizer.fp32_partitioned_groups_flat[given].grad
    masters = optimizer.single_partition_of_fp32_groups
    return next(index for index, own in enumerate(masters) if own.grad is given[0]), given[0]


def is_offloaded(optimizer: Any, stage: int) -> bool:
    """Whether its gradients lie on the host, and their norms with them."""
    return bool(optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload)


def paired(parameters: list[Any], gradients: list[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Parameters with their gradients; DeepSpeed puts zeros between them, which it marks, and after them."""
    real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    return zip(parameters, real, strict=False)


def _fragments(optimizer: Any) -> Iterator[Part]:
    """Stages 1 and 2: a group's parameters lie end to end, and each rank steps a stretch of them."""
    for index, group in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:
            flat = optimizer.single_partition_of_fp32_groups[index].grad.view(-1)
            found = [(own, flat.narrow(0, *_place(own))) for own in group]
        else:
            found = list(paired(group, optimizer.averaged_gradients[index]))
        for parameter, gradient in found:
            mapping = parameter._hp_mapping
            weight = mapping.hp_fragment.detach().view(-1)
            start = mapping.lp_fragment_address.start
            yield Part(parameter, gradient.view(-1), weight, start, index, mapping.hp_fragment_address.start)


def _place(parameter: Any) -> tuple[int, int]:
    address = parameter._hp_mapping.hp_fragment_address
    return address.start, address.numel


def _partitions(optimizer: Any) -> Iterator[Part]:
    """Stage 3: each parameter is cut into equal stretches, the last one padded."""
    from deepspeed.utils import safe_get_local_fp32_param

    for index, group in enumerate(optimizer.fp16_groups):
        for number, parameter in enumerate(group):
            place, size = optimizer.grad_position[optimizer.get_param_id(parameter)][1:]
            if optimizer.offload_optimizer:
                gradient = optimizer.fp32_partitioned_groups_flat[index].grad.narrow(0, place, size)
            else:
                gradient = optimizer.averaged_gradients[index][number]
            numel = math.prod(parameter.ds_shape)
            start = min(torch.distributed.get_rank(parameter.ds_process_group) * size, numel)
            real = min(size, numel - start)
            weight = safe_get_local_fp32_param(parameter).detach()
            yield Part(parameter, gradient.view(-1)[:real], weight.view(-1)[:real], start, index, place)
