"""FSDP2: each parameter and its gradient is a DTensor, cut along its first dimension."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.engines._base import Entry
from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._facts import by_elements, short, within
from lightning_tricks.engines._gradients import sum_over_shards
from lightning_tricks.engines._live import Held
from lightning_tricks.engines._plain import PlainEngine
from lightning_tricks.engines._units import Limits, Stretch, Units, clip_whole_units
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

    def _leave_forward(self) -> None:
        """A part that still believes to be in its forward pass would stay gathered."""
        for module in filter(_is_sharded, self._module.modules()):
            state = _state(module)
            for part in (state, *state._fsdp_param_groups):
                part._training_state = type(part._training_state).IDLE

    def _clip_own_units(self, parameters: list[Tensor], limits: Limits) -> list[tuple[Tensor, int]]:
        """Rows lie whole on one rank, but a vector is cut: so squares are summed over the ranks, once for a layout."""
        alike: dict[Any, list[Any]] = {}
        for own in parameters:
            layout = (own.device_mesh, own.placements) if hasattr(own, "placements") else None  # type: ignore[attr-defined]
            alike.setdefault(layout, []).append(own)
        found = [clip_whole_units(alike.pop(None, []), limits, self._device)]
        names = {id(parameter): name for name, parameter in self._named_parameters().items()}
        for group in alike.values():
            stretches = [self._stretch(Entry(names[id(parameter)], parameter)) for parameter in group]
            units = Units(stretches, limits, self._device, functools.partial(sum_over_shards, like=group[0]))
            for index, stretch in enumerate(stretches):
                units.scale(index, stretch.gradient, stretch.start)
            found.append((units.clipped, units.count))
        return found

    def _stretch(self, entry: Entry) -> Stretch:
        parameter: Any = entry.tensor
        part = self._part(entry)
        if part is None or parameter.grad is None:
            none = parameter.to_local().new_empty(0)
            return Stretch(none, none, 0, tuple(parameter.shape))
        return Stretch(part[0], parameter.grad.to_local().view(-1), part[1], tuple(parameter.shape))

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

    # -- what it holds -----------------------------------------------------------------------------------------

    def _held(self) -> Held:
        self._reshard()
        states = [_state(module) for module in self._module.modules() if _is_sharded(module)]
        return super()._held()._replace(engine={"gathered parameters": within(states, "torch.distributed.fsdp")})

    def _computed(self) -> Iterator[tuple[torch.dtype, int]]:
        for parameter, policy in _policies(self._module, None):
            yield (policy and policy.param_dtype) or parameter.dtype, parameter.numel()

    def _reduction(self) -> tuple[torch.dtype, ...]:
        return by_elements(
            (policy.reduce_dtype or policy.param_dtype or parameter.dtype, parameter.numel())
            for parameter, policy in _policies(self._module, None)
            if parameter.requires_grad and policy is not None and parameter.device_mesh.size() > 1
        )

    def _input_casts(self) -> list[str]:
        sharded = [(module, _state(module)._mp_policy) for module in self._module.modules() if _is_sharded(module)]
        casting = [(module, policy) for module, policy in sharded if policy.cast_forward_inputs and policy.param_dtype]
        return [
            f"{type(module).__name__.removeprefix('FSDP')} casts its float inputs to {short(policy.param_dtype)}"
            for module, policy in {type(module): (module, policy) for module, policy in casting}.values()
        ]


def place(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a DTensor, and where in the whole it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in shape:  # a rank without a part: its offset may lie beyond the end
        offset = torch.Size([0] * len(shape))
    return tuple(shape), tuple(offset)


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _state(module: Any) -> Any:
    return module._get_fsdp_state()


def _policies(module: nn.Module, policy: Any) -> Iterator[tuple[Any, Any]]:
    """Each parameter with the mixed-precision policy it is gathered under; None if it is not sharded by FSDP2."""
    policy = _state(module)._mp_policy if _is_sharded(module) else policy
    for parameter in module.parameters(recurse=False):
        yield parameter, policy if hasattr(parameter, "to_local") else None
    for child in module.children():
        yield from _policies(child, policy)
