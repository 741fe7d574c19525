"""DeepSpeed ZeRO 1-3: fp32 masters in flat pieces, and a norm that is read before the step that uses it.

DeepSpeed's private attributes are touched here and in the files `_zero_*.py` only; `_zero_private.py` lists them all.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.engines import _zero_facts
from lightning_tricks.engines._base import BaseEngine, Entry
from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._clipping import deepspeed_config
from lightning_tricks.engines._gradients import exceeds
from lightning_tricks.engines._live import Held, elements
from lightning_tricks.engines._snapshot import Snapshot
from lightning_tricks.engines._units import Limits, Stretch, Units, share
from lightning_tricks.engines._zero_parts import Part
from lightning_tricks.engines._zero_step import StepGradients
from lightning_tricks.errors import UnsupportedError
from lightning_tricks.storage import WeightsFile

__all__ = ["DeepSpeedEngine", "full_value"]


class DeepSpeedEngine(BaseEngine):
    """The engine of `zero_1`, `zero_2`, `zero_3` and of Lightning's `DeepSpeedStrategy` at those stages."""

    def __init__(self, trainer: Trainer) -> None:
        self._stage = int(deepspeed_config(trainer).get("zero_optimization", {}).get("stage", 0))
        super().__init__(trainer, f"zero_{self._stage}")
        self._gradients: Callable[[], StepGradients | None] = lambda: None
        if self._stage == 0:
            raise UnsupportedError(
                "A trick", "DeepSpeed without ZeRO", "its optimizer keeps no norm", "use `strategy='ddp'` or 'zero_1'"
            )

    # -- gradients ---------------------------------------------------------------------------------------------

    def is_optimizer_step(self) -> bool:
        """Whether DeepSpeed will step: Lightning's own strategy calls the hook on every micro-batch."""
        return bool(self._live.is_gradient_accumulation_boundary())

    def _norm(self, optimizer: Optimizer) -> Tensor:
        return self._step_gradients().norm()

    def _group_norms(self, optimizer: Optimizer, groups: list[list[Tensor]]) -> Tensor:
        return self._step_gradients().group_norms(groups, self._device)

    def _clip(self, optimizer: Optimizer, norm: Tensor, limit: float | Tensor) -> None:
        self._step_gradients().clip(float(limit) if bool(norm.isfinite()) else 0.0)

    def _clip_values(self, optimizer: Optimizer, parameters: list[Tensor], limit: float) -> Tensor:
        gradients = self._step_gradients()
        chosen = _parts_of(gradients, parameters)
        outside = exceeds([part.gradient for part in chosen], limit * gradients.divisor(), self._device)
        gradients.edit(lambda index, flat: _each(chosen, index, flat, lambda _, own: own.clamp_(-limit, limit)))
        return (self.sum_over_ranks(outside) > 0).float()

    def _clip_units(self, optimizer: Optimizer, parameters: list[Tensor], limits: Limits) -> Tensor:
        gradients = self._step_gradients()
        numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        chosen = _parts_of(gradients, parameters)
        none = torch.empty(0)
        stretches = [Stretch(none, none, 0, self._layout(parameter)[1]) for parameter in parameters]
        for part in chosen:
            number = numbers[id(part.parameter)]
            stretches[number] = Stretch(part.weight, part.gradient, part.start, stretches[number].shape)
        units = Units(stretches, limits, self._device, self.sum_over_ranks, gradients.divisor())
        gradients.edit(
            lambda index, flat: _each(
                chosen, index, flat, lambda part, own: units.scale(numbers[id(part.parameter)], own, part.start)
            )
        )
        return share([(units.clipped, units.count)], self._device)

    def _scale_groups(self, optimizer: Optimizer, groups: list[tuple[list[Tensor], Tensor]]) -> None:
        gradients = self._step_gradients()
        for parameters, factor in groups:
            self._scale_group(gradients, _parts_of(gradients, parameters), factor)

    def _scale_group(self, gradients: StepGradients, chosen: list[Part], factor: Tensor) -> None:
        gradients.edit(lambda index, flat: _each(chosen, index, flat, lambda _, own: own.mul_(factor.to(own.device))))

    def _scale(self, optimizer: Optimizer, factor: float) -> None:
        self._step_gradients().scale(factor)

    def _leave_out(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        self._step_gradients().leave_out(parameters)

    def _veto(self, optimizer: Optimizer) -> None:
        self._step_gradients().veto()

    def was_step_applied(self) -> bool:
        """DeepSpeed's own answer."""
        return bool(self._live.was_step_applied())

    def scales_loss(self) -> bool:
        """Whether DeepSpeed trains in fp16."""
        return bool(self._live.fp16_enabled())

    def _step_gradients(self) -> StepGradients:
        gradients = self._gradients()
        if gradients is None or gradients.engine is not self._live:
            gradients = StepGradients(self._live, self._stage)
            self._gradients = weakref.ref(gradients)  # the optimizer keeps it; an engine keeps no model alive
        return gradients

    @property
    def _live(self) -> Any:
        return self._trainer.strategy.model

    # -- weights -----------------------------------------------------------------------------------------------

    def _layout(self, tensor: Any) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype = torch.float32 if _has_master(tensor) else tensor.dtype
        return dtype, tuple(getattr(tensor, "ds_shape", tensor.shape))

    def _whole(self, tensor: Tensor) -> Tensor:
        return full_value(tensor)

    def _before_writing(self) -> None:
        """ZeRO-3: drop the whole copies, which would stay as they were; an evaluation's engine names it otherwise."""
        optimizer = self._live.optimizer
        if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
            raise refusal("nvme")
        for name in ("_partition_all_parameters", "partition_all_parameters"):
            if self._stage == 3 and hasattr(optimizer, name):
                getattr(optimizer, name)()
                break

    def _write(self, entry: Entry, file: WeightsFile) -> None:
        tensor: Any = entry.tensor
        if hasattr(tensor, "ds_id"):
            _write_partition(tensor, entry.name, file)
        elif hasattr(tensor, "_hp_mapping"):
            _write_fragment(tensor, entry.name, file)
        else:
            tensor.copy_(file.tensor(entry.name))

    def _part(self, entry: Entry) -> tuple[Tensor, int] | None:
        tensor: Any = entry.tensor
        if hasattr(tensor, "ds_id"):
            start, stop = _partition_place(tensor)
            return _local_partition(tensor).detach()[: stop - start], start
        if hasattr(tensor, "_hp_mapping"):
            mapping = tensor._hp_mapping
            return None if mapping is None else (mapping.hp_fragment.detach(), mapping.lp_fragment_address.start)
        return super()._part(entry)

    def _put(self, entry: Entry, values: Tensor) -> None:
        tensor: Any = entry.tensor
        if hasattr(tensor, "ds_id"):
            _put_partition(tensor, values)
        elif hasattr(tensor, "_hp_mapping"):
            tensor._hp_mapping.hp_fragment.copy_(values)
        else:
            super()._put(entry, values)

    def _publishes_alone(self) -> bool:
        return self.world_size == 1

    def _publish(self) -> None:
        optimizer = self._live.optimizer
        if self._stage < 3 and hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        elif hasattr(optimizer, "persistent_parameters"):
            training = hasattr(optimizer, "fp16_groups")
            for group in range(len(optimizer.fp16_groups) if training else 0):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            if training:
                optimizer.invalidate_secondary_tensor()

    def _steppers(self) -> list[Optimizer]:
        """The one that ZeRO's own drives, on flat pieces of the masters."""
        return [self._live.optimizer.optimizer]

    def restore_state(self, state: Snapshot) -> None:
        """Put it back; moments that had not been are made anew, and stages 1 and 2 then look for them again."""
        super().restore_state(state)
        if self._stage < 3 and not any(moments.states for moments in state.optimizers):
            self._live.optimizer._hp_optimizer_states_linked = False

    # -- what it holds -----------------------------------------------------------------------------------------

    def _is_set_up(self) -> bool:
        return hasattr(self._live, "was_step_applied")  # before that, it is the plain module

    def _held(self) -> Held:
        return _zero_facts.held(self._live, self._module)

    def _masters(self) -> list[Tensor]:
        return _zero_facts.masters(self._live)

    def _computed(self) -> Iterator[tuple[torch.dtype, int]]:
        cast = _zero_facts.uses_autocast(self._live)
        for parameter in self._module.parameters():
            yield cast or parameter.dtype, elements(parameter)

    def _reduction(self) -> tuple[torch.dtype, ...]:
        return _zero_facts.reduction(self._live)


def _parts_of(gradients: StepGradients, parameters: list[Tensor]) -> list[Part]:
    wanted = {id(parameter) for parameter in parameters}
    return [part for part in gradients.parts() if id(part.parameter) in wanted]


def _each(chosen: list[Part], index: int, flat: Tensor, change: Callable[[Part, Tensor], object]) -> None:
    """Change the stretches that lie in one flat piece."""
    for part in chosen:
        if part.piece == index:
            change(part, flat.view(-1).narrow(0, part.place, part.weight.numel()))


def full_value(parameter: Any) -> Tensor:
    """A parameter's whole value, from its fp32 master if it is trained. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    if _has_master(parameter):
        master: Tensor = safe_get_full_fp32_param(parameter)
        return master
    if not hasattr(parameter, "ds_id"):
        plain: Tensor = parameter.detach()
        return plain
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        gathered: Tensor = parameter.detach().clone()
    return gathered


def _has_master(parameter: Any) -> bool:
    return hasattr(parameter, "_hp_mapping") or (parameter.requires_grad and hasattr(parameter, "_z3_optimizer"))


def _write_fragment(parameter: Any, name: str, file: WeightsFile) -> None:
    """ZeRO-1/2: this rank's slice of the flattened parameter, into its master."""
    if (mapping := parameter._hp_mapping) is not None:
        address = mapping.lp_fragment_address
        mapping.hp_fragment.copy_(file.elements(name, address.start, address.start + address.numel))


def _write_partition(parameter: Any, name: str, file: WeightsFile) -> None:
    start, stop = _partition_place(parameter)
    _put_partition(parameter, file.elements(name, start, stop) if start < stop else torch.empty(0))


def _partition_place(parameter: Any) -> tuple[int, int]:
    """ZeRO-3: where this rank's equal part of the flattened parameter begins and ends."""
    size, numel = parameter.ds_tensor.numel(), math.prod(parameter.ds_shape)
    start = min(torch.distributed.get_rank(parameter.ds_process_group) * size, numel)
    return start, min(start + size, numel)


def _local_partition(parameter: Any) -> Tensor:
    if not _has_master(parameter):
        plain: Tensor = parameter.ds_tensor
        return plain
    if parameter._z3_optimizer.swap_optimizer:
        raise refusal("nvme")
    from deepspeed.utils import safe_get_local_fp32_param

    master: Tensor = safe_get_local_fp32_param(parameter)
    return master


def _put_partition(parameter: Any, values: Tensor) -> None:
    """ZeRO-3: into this rank's part, the end of the last one padded with zeros."""
    padded = torch.zeros(parameter.ds_tensor.numel(), device=values.device)
    padded[: values.numel()] = values
    if _has_master(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, padded)
    else:
        parameter.ds_tensor.copy_(padded)
