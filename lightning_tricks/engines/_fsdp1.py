"""FSDP1, Lightning's `FSDPStrategy`: a unit's parameters lie end to end in a flat one, which is cut anywhere."""

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tricks.engines import _flat as flat
from lightning_tricks.engines._base import Entry
from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._facts import by_elements, short
from lightning_tricks.engines._gradients import gradients_of, group_norms
from lightning_tricks.engines._live import Held
from lightning_tricks.engines._plain import PlainEngine
from lightning_tricks.engines._units import Limits, Stretch, Units
from lightning_tricks.storage import WeightsFile

__all__ = ["FSDP1Engine"]

_GATHERED = ("_full_param_padded", "_full_prec_full_param_padded", "_mp_shard")


class FSDP1Engine(PlainEngine):
    """The engine of Lightning's `FSDPStrategy`. This rank's stretches of the flat parameters are the masters."""

    def __init__(self, trainer: Trainer) -> None:
        if not getattr(trainer.strategy, "kwargs", {}).get("use_orig_params", True):
            raise refusal("flat_parameters")
        super().__init__(trainer, "fsdp1")
        self._known: tuple[Any, dict[int, flat.Place]] = (lambda: None, {})

    @property
    def _root(self) -> nn.Module:
        root: nn.Module = self._trainer.strategy.model  # type: ignore[assignment]
        return root

    def _places(self) -> dict[int, flat.Place]:
        """Found once for each model: a parameter keeps its place."""
        root = self._root
        if self._known[0]() is not root:
            self._known = (weakref.ref(root), flat.places(root))
        return self._known[1]

    def _plain_name(self, name: str) -> str:
        return flat.plain_name(super()._plain_name(name))

    # -- gradients ---------------------------------------------------------------------------------------------

    def _members(self, groups: Mapping[str, Sequence[str]]) -> list[list[Tensor]]:
        """Names of the wrapped module count too: that is what a callback finds in `named_parameters()`."""
        return super()._members({group: [self._plain_name(name) for name in names] for group, names in groups.items()})

    def _norm(self, optimizer: Optimizer) -> Tensor:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return self._group_norms(optimizer, [parameters])[0]

    def _group_norms(self, optimizer: Optimizer, groups: list[list[Tensor]]) -> Tensor:
        """Squares of this rank's stretches, added up over the ranks that share them."""
        self._refuse_scaled_gradients(optimizer)
        ours = {id(gradient) for gradient in gradients_of(optimizer)}
        total = torch.zeros(len(groups), dtype=torch.float64, device=self._device)
        for sharing in {id(place.group): place.group for place in self._places().values()}.values():
            parts = [[p.grad for p in own if id(p.grad) in ours and self._sharing(p) is sharing] for own in groups]
            found = [[part for part in own if part is not None] for own in parts]
            total += _summed(group_norms(found, self._device).double().square(), sharing)
        return total.sqrt().float()

    def _clip_values(self, optimizer: Optimizer, parameters: list[Tensor], limit: float) -> Tensor:
        return (self.sum_over_ranks(super()._clip_values(optimizer, parameters, limit)) > 0).float()

    def _clip_own_units(self, parameters: list[Tensor], limits: Limits) -> list[tuple[Tensor, int]]:
        """A unit may begin on one rank and end on another: squares are summed, once for each group of ranks."""
        found = []
        for sharing in {id(place.group): place.group for place in self._places().values()}.values():
            own = [parameter for parameter in parameters if self._sharing(parameter) is sharing]
            stretches = [self._stretch(parameter) for parameter in own]
            units = Units(stretches, limits, self._device, functools.partial(_summed, group=sharing))
            for index, stretch in enumerate(stretches):
                units.scale(index, stretch.gradient, stretch.start)
            found.append((units.clipped, units.count))
        return found

    def _stretch(self, parameter: Tensor) -> Stretch:
        place, none = self._places()[id(parameter)], parameter.detach().new_empty(0)
        if parameter.grad is None:
            return Stretch(none, none, 0, place.shape)
        return Stretch(parameter.detach().view(-1), parameter.grad.view(-1), place.start, place.shape)

    def _sharing(self, parameter: Tensor) -> Any:
        """The ranks among which a parameter with a gradient is cut."""
        if id(parameter) not in self._places():
            self._refuse_outsiders()
        return self._places()[id(parameter)].group

    def _refuse_outsiders(self) -> None:
        """Refuse what is trained but not sharded: FSDP1 leaves its gradients as each rank has them."""
        places = self._places()
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad and id(parameter) not in places:
                raise refusal("outside_units", name=self._plain_name(name))

    # -- weights -----------------------------------------------------------------------------------------------

    def _trained(self) -> list[Entry]:
        flat.reshard(self._root)
        self._refuse_outsiders()
        return super()._trained()

    def _state_keys(self) -> list[str]:
        flat.reshard(self._root)
        self._refuse_outsiders()
        return flat.own_state_keys(self._module)

    def _layout(self, tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
        place = self._places().get(id(tensor))
        return super()._layout(tensor) if place is None else (tensor.dtype, place.shape)

    def _whole(self, tensor: Tensor) -> Tensor:
        place = self._places().get(id(tensor))
        return tensor if place is None else flat.gathered(tensor, place, self._device)

    def _write(self, entry: Entry, file: WeightsFile) -> None:
        place = self._places().get(id(entry.tensor))
        if place is None:
            super()._write(entry, file)
        elif count := entry.tensor.numel():
            self._put(entry, file.elements(entry.name, place.start, place.start + count))

    def _part(self, entry: Entry) -> tuple[Tensor, int] | None:
        return entry.tensor.detach().reshape(-1), self._places()[id(entry.tensor)].start

    # -- what it holds -----------------------------------------------------------------------------------------

    def _held(self) -> Held:
        flat.reshard(self._root)
        flats = [flat.private(handle, "flat_param") for handle in flat.handles(self._root)]
        held = super()._held()
        kept = [getattr(each, name, None) for each in flats for name in _GATHERED]
        gradients = [each.grad for each in flats if each.grad is not None]
        return held._replace(
            parameters=[*held.parameters, *flats],
            gradients=[*held.gradients, *gradients],
            engine={"gathered parameters": [tensor for tensor in kept if tensor is not None]},
        )

    def _computed(self) -> Iterator[tuple[torch.dtype, int]]:
        for handle in flat.handles(self._root):
            yield flat.private(handle, "_fwd_bwd_param_dtype"), flat.private(handle, "flat_param").numel()

    def _reduction(self) -> tuple[torch.dtype, ...] | None:
        return by_elements(
            (flat.private(handle, "_reduce_dtype"), flat.private(handle, "flat_param").numel())
            for handle in flat.handles(self._root)
            if flat.private(handle, "flat_param").requires_grad
        )

    def _input_casts(self) -> list[str]:
        policies = [flat.private(unit, "mixed_precision") for unit in flat.units(self._root)[:1]]
        low = [policy.param_dtype for policy in policies if policy.cast_root_forward_inputs and policy.param_dtype]
        return [f"the root casts its float inputs to {short(dtype)}" for dtype in low if dtype != torch.float32]


def _summed(values: Tensor, group: Any) -> Tensor:
    """Added up in place over the ranks of a group; None: each holds the whole."""
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values
