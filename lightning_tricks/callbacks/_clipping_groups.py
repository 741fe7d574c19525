"""What one optimizer's gradients are clipped by: one policy for all of them, or one for each part of the model."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.callbacks._clipping_policies import ClippingPolicy
from lightning_tricks.callbacks._gradient_policies import GradientPolicy
from lightning_tricks.callbacks._selection import none_selected, selected, trained_names
from lightning_tricks.engines import Engine
from lightning_tricks.functional import clip_coefficient

__all__ = ["ClippedGroups", "ClippedWhole"]

Policy = ClippingPolicy | GradientPolicy


class ClippedWhole:
    """One policy for all gradients of an optimizer.

    Args:
        policy: the policy; its state is kept here.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._names: list[str] = []

    def find(self, module: LightningModule, optimizer: Optimizer | None) -> None:
        """Find the parameters that the policy does not leave out."""
        names = trained_names(module)
        self._names = _without(self.policy, names, module)

    def clip(self, engine: Engine, optimizer: Optimizer, norm: Tensor) -> dict[str, Tensor]:
        """Clip, and say what is logged besides the norm."""
        if isinstance(self.policy, GradientPolicy):
            return {"clipped": self.policy.apply(engine, optimizer, self._names)}
        limit = self.policy.limit(norm)
        engine.clip_gradient_norm(optimizer, limit)
        return {"limit": _on_device(limit, norm), "clipped": _is_clipped(norm, limit)}

    def state_dict(self) -> dict[str, Any]:
        """The policy's own."""
        return _state(self.policy)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand it back to the policy."""
        _load(self.policy, state)


class ClippedGroups:
    """A policy for each part of the model, each with a norm of its own.

    Args:
        policies: by prefix or pattern; the first that selects a parameter has it.
    """

    def __init__(self, policies: dict[str, Policy]) -> None:
        self.policies = policies
        self._members: dict[str, list[str]] = {}
        self._norms: dict[str, list[str]] = {}

    def find(self, module: LightningModule, optimizer: Optimizer | None) -> None:
        """Find each part's parameters; with several optimizers, those of this one."""
        names, left, found = trained_names(module), trained_names(module), {}
        for part, policy in self.policies.items():
            members = selected(part, left)
            if not members:
                raise none_selected("the part of GradientClipping", part, module, left or names)
            left = [name for name in left if name not in set(members)]
            found[part] = _without(policy, members, module)
        own = set(names if optimizer is None else _names_in(optimizer, module))
        kept = {part: [name for name in members if name in own] for part, members in found.items()}
        self._members = {part: members for part, members in kept.items() if members}
        by_norm = [part for part in self._members if not isinstance(self.policies[part], GradientPolicy)]
        self._norms = {part: self._members[part] for part in by_norm}

    def clip(self, engine: Engine, optimizer: Optimizer, norm: Tensor) -> dict[str, Tensor]:
        """Clip, and say what is logged besides the norm of the whole."""
        logged: dict[str, Tensor] = {}
        factors = {}
        for part, own in engine.gradient_norms(optimizer, self._norms).items():
            limit = self.policies[part].limit(own)  # type: ignore[union-attr]
            factors[part] = clip_coefficient(own, limit)
            logged |= {part: own, f"limit/{part}": _on_device(limit, own), f"clipped/{part}": _is_clipped(own, limit)}
        engine.scale_gradient_groups(optimizer, factors, self._norms)
        for part, members in self._members.items():
            policy = self.policies[part]
            if isinstance(policy, GradientPolicy):
                logged[f"clipped/{part}"] = policy.apply(engine, optimizer, members)
        return logged

    def state_dict(self) -> dict[str, Any]:
        """Those of the policies, by part."""
        states = {part: _state(policy) for part, policy in self.policies.items()}
        return {part: state for part, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand them back; a part that is new begins anew."""
        for part, saved in state.items():
            if part in self.policies:
                _load(self.policies[part], saved)


def _without(policy: Policy, names: list[str], module: LightningModule) -> list[str]:
    """The names that a policy does not leave out."""
    for pattern in getattr(policy, "exclude", ()):
        excluded = set(selected(pattern, names))
        if not excluded:
            raise none_selected(f"`exclude` of {type(policy).__name__}:", pattern, module, names)
        names = [name for name in names if name not in excluded]
    return names


def _names_in(optimizer: Optimizer, module: LightningModule) -> list[str]:
    """The names of an optimizer's parameters."""
    ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [name for name, own in zip(trained_names(module), trained, strict=True) if id(own) in ours]


def _on_device(limit: float | Tensor, norm: Tensor) -> Tensor:
    return limit if isinstance(limit, Tensor) else torch.full_like(norm, limit)  # a fill waits for nothing


def _is_clipped(norm: Tensor, limit: float | Tensor) -> Tensor:
    return (clip_coefficient(norm, limit) < 1).to(norm.dtype)


def _state(policy: Policy) -> dict[str, Any]:
    saver = getattr(policy, "state_dict", None)
    state: dict[str, Any] = {} if saver is None else saver()
    return state


def _load(policy: Policy, state: dict[str, Any]) -> None:
    loader = getattr(policy, "load_state_dict", None)
    if loader is not None:
        loader(state)
