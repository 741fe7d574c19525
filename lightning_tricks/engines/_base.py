"""What all engines share about gradients: the claim on clipping, one norm a step, a veto once a step."""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._clipping import options_that_clip
from lightning_tricks.engines._live import LiveEngine
from lightning_tricks.engines._snapshot import Snapshot, copy_buffers, moments_of, put_moments
from lightning_tricks.engines._units import Limits
from lightning_tricks.engines._weights import Entry
from lightning_tricks.errors import MisconfigurationError

__all__ = ["BaseEngine", "Entry"]


class BaseEngine(LiveEngine, ABC):
    """The parts of the `Engine` protocol that do not depend on how parameters are laid out.

    A subclass says how the norms are found (`_norm`, `_group_norms`), how gradients are scaled (`_clip`), how a step is
    dropped (`_veto`) and noticed (`was_step_applied`), and what `WeightsEngine` and `LiveEngine` ask.

    Args:
        trainer: the Trainer; held weakly, so that an engine never keeps a model alive.
        name: the engine's name.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        super().__init__(trainer, name)
        self._claims: set[str] = set()
        # Both per optimizer, with the step that they are of: a step of one optimizer is no step of another.
        self._norms: weakref.WeakKeyDictionary[Any, tuple[int, Tensor]] = weakref.WeakKeyDictionary()
        self._vetoes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    # -- gradients ---------------------------------------------------------------------------------------------

    def claim_gradient_clipping(self, trick: str) -> None:
        """Reserve norm clipping for `trick`."""
        trainer = self._trainer
        if options := options_that_clip(trainer):
            raise MisconfigurationError(f"{trick} and {options[0]} both clip gradients: remove one.")
        names = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
        rivals = [claim for claim in self._claims - {trick} if claim in names]
        rivals += [trick] * (names.count(trick) > 1)
        if rivals:
            raise MisconfigurationError(f"{trick} and {rivals[0]} both clip gradients: keep one of these callbacks.")
        self._claims.add(trick)

    def is_optimizer_step(self) -> bool:
        """Whether a real step follows: always, where Lightning itself accumulates."""
        return True

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """The global norm of this step's gradients, computed once."""
        _refuse_closures(optimizer)
        step = self._trainer.global_step
        known, norm = self._norms.get(optimizer, (-1, None))
        if norm is None or known != step:
            norm = self._norm(optimizer)
            self._norms[optimizer] = (step, norm)
        return norm

    def gradient_norms(self, optimizer: Optimizer, groups: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """The norm of each named group of parameters."""
        _refuse_closures(optimizer)
        members = self._members(groups)
        if not members:
            return {}
        norms = self._group_norms(optimizer, members)
        if self._is_vetoed(optimizer):
            norms = torch.full_like(norms, torch.nan)
        return dict(zip(groups, norms.unbind(), strict=True))

    def _members(self, groups: Mapping[str, Sequence[str]]) -> list[list[Tensor]]:
        """The parameters of each group, each once."""
        named = self._named_parameters()
        unknown = [name for names in groups.values() for name in names if name not in named]
        if unknown:
            raise MisconfigurationError(
                f"`{unknown[0]}` is no parameter of {type(self._module).__name__}: take names from"
                " `named_parameters()`, without the `_orig_mod.` of compiled modules."
            )
        return [list({id(named[name]): named[name] for name in names}.values()) for names in groups.values()]

    def clip_gradient_norm(self, optimizer: Optimizer, limit: float | Tensor) -> None:
        """Scale this step's gradients by `min(1, limit / norm)`."""
        self._clip(optimizer, self.gradient_norm(optimizer), limit)

    def clip_gradient_value(self, optimizer: Optimizer, limit: float, names: Sequence[str] | None = None) -> Tensor:
        """Clamp this step's gradients."""
        self.gradient_norm(optimizer)  # whoever asks later in this step gets the norm of the gradients as they were
        return self._clip_values(optimizer, self._named(names), limit)

    def clip_gradient_units(
        self, optimizer: Optimizer, ratio: float, floor: float, names: Sequence[str] | None = None
    ) -> Tensor:
        """Scale each unit's gradient to its weights."""
        self.gradient_norm(optimizer)
        return self._clip_units(optimizer, self._named(names), Limits(ratio, floor))

    def scale_gradient_groups(
        self, optimizer: Optimizer, factors: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]
    ) -> None:
        """Multiply the gradients of each group."""
        self.gradient_norm(optimizer)
        members = dict(zip(groups, self._members(groups), strict=True))
        self._scale_groups(optimizer, [(members[group], factor) for group, factor in factors.items()])

    def _named(self, names: Sequence[str] | None) -> list[Tensor]:
        """The parameters of these names, or all that are trained; each once."""
        if names is not None:
            return self._members({"": names})[0]
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    def scale_gradients(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply this step's gradients, and the norm if it is known already."""
        _refuse_closures(optimizer)
        if not 0 < factor < math.inf:
            raise MisconfigurationError(f"`factor` must be a finite number above 0, got {factor}.")
        known, norm = self._norms.get(optimizer, (-1, None))
        if norm is not None and known == self._trainer.global_step:
            self._norms[optimizer] = (known, norm * factor)
        self._scale(optimizer, factor)

    def leave_out(self, optimizer: Optimizer, names: Sequence[str]) -> None:
        """Let this step pass by these parameters."""
        _refuse_closures(optimizer)
        if self._norms.get(optimizer, (-1, None))[0] == self._trainer.global_step:
            raise MisconfigurationError(
                "a callback asked for the norm of gradients before another left a part of them out of this step: put"
                " the one that leaves out first in `Trainer(callbacks=...)`."
            )
        self._leave_out(optimizer, self._members({"": names})[0])

    def awaits_gradients(self) -> bool:
        """Whoever reduces gradients over ranks does."""
        return True

    def veto_step(self, optimizer: Optimizer) -> None:
        """Drop this step, once, on all ranks."""
        self.gradient_norm(optimizer)  # whoever asks later in this step gets the norm of the gradients as they were
        if not self._is_vetoed(optimizer):
            self._vetoes[optimizer] = self._trainer.global_step
            self._veto(optimizer)

    # -- the whole state ---------------------------------------------------------------------------------------

    def capture_state(self) -> Snapshot:
        """Copy this rank's part of the training state."""
        weights = {shard.name: shard.values.clone() for shard in self.named_shards()}
        buffers = {name: buffer.detach().clone() for name, buffer in self._module.named_buffers()}
        return Snapshot(weights, buffers, tuple(moments_of(optimizer) for optimizer in self._steppers()))

    def restore_state(self, state: Snapshot) -> None:
        """Put it back."""
        self.put_shards(state.weights)
        copy_buffers(dict(self._module.named_buffers()), state.buffers)
        with torch.no_grad():
            for optimizer, saved in zip(self._steppers(), state.optimizers, strict=True):
                put_moments(optimizer, saved)

    def _steppers(self) -> list[Optimizer]:
        """The optimizers that hold the moments."""
        return list(self._trainer.optimizers)

    def _forget_step(self, optimizer: Optimizer) -> None:
        """After the optimizer's step: a fit that goes back to this step number must not find what this one left."""
        self._norms.pop(optimizer, None)
        self._vetoes.pop(optimizer, None)

    def _is_vetoed(self, optimizer: Optimizer) -> bool:
        return self._vetoes.get(optimizer) == self._trainer.global_step

    # -- what a subclass says ----------------------------------------------------------------------------------

    @abstractmethod
    def _norm(self, optimizer: Optimizer) -> Tensor: ...

    @abstractmethod
    def _group_norms(self, optimizer: Optimizer, groups: list[list[Tensor]]) -> Tensor: ...

    @abstractmethod
    def _clip(self, optimizer: Optimizer, norm: Tensor, limit: float | Tensor) -> None: ...

    @abstractmethod
    def _clip_values(self, optimizer: Optimizer, parameters: list[Tensor], limit: float) -> Tensor: ...

    @abstractmethod
    def _clip_units(self, optimizer: Optimizer, parameters: list[Tensor], limits: Limits) -> Tensor: ...

    @abstractmethod
    def _scale_groups(self, optimizer: Optimizer, groups: list[tuple[list[Tensor], Tensor]]) -> None: ...

    @abstractmethod
    def _scale(self, optimizer: Optimizer, factor: float) -> None: ...

    @abstractmethod
    def _leave_out(self, optimizer: Optimizer, parameters: list[Tensor]) -> None: ...

    @abstractmethod
    def _veto(self, optimizer: Optimizer) -> None: ...

    @abstractmethod
    def was_step_applied(self) -> bool:
        """Whether the last optimizer step changed the weights."""

    @abstractmethod
    def scales_loss(self) -> bool:
        """Whether fp16 scales the loss, and drops steps by itself."""

    def unscaled_loss(self, loss: Tensor) -> Tensor:
        """As it is, where Lightning does not scale it."""
        return loss


def _refuse_closures(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS):
        raise refusal("closure")
