"""What mixins of adapters declare to the check, and an optimizer's groups for their parameters."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_tricks.engines import InUse, Rule, Situation, Trick
from lightning_tricks.layers import adapted_layers

__all__ = ["groups", "trick_named", "warn_of_unused_ratio"]

_GROUPED = "_has_given_groups"


def trick_named(mixin: str) -> Trick:
    """What a mixin of this name declares; of a module's adapting mixins, the first one in its order is named."""
    return Trick(
        jobs=("adapt weights",),
        rules=(_ROUNDED_AT_REST,),
        used=lambda module: "_adapted" in vars(module) and _first(module) == mixin,
    )


def _first(module: Any) -> str:
    """Of the module's base classes, the first that is a mixin of adapters."""
    bases = (base for base in type(module).__mro__ if isinstance(vars(base).get("trick"), Trick))
    return next(base.__name__ for base in bases if "adapt weights" in vars(base)["trick"].jobs)


def _rounded_at_rest(situation: Situation, used: InUse) -> dict[str, object] | None:
    """DeepSpeed keeps fp32 master copies of what it trains alone."""
    resting = sorted({n for _, layer in adapted_layers(used.source) for n in layer.adapters if n not in layer.active})
    if situation.zero and situation.precision != "32-true" and resting:
        return {"names": ", ".join(resting)}
    return None


_ROUNDED_AT_REST = Rule(
    _rounded_at_rest,
    "degraded",
    "the adapters at rest ({names}) are rounded to 16 bits like the base, in the checkpoints of this fit too",
    "save them by `save_adapter` before, use precision '32-true', or strategy 'fsdp2'",
)


def warn_of_unused_ratio(owner: Any) -> None:
    """LoRA+ is a matter of the optimizer: say so when it was not asked for its groups."""
    if _GROUPED in vars(owner):
        return
    for held in vars(owner).get("_adapted", {}).values():
        for name, adapter in held.items():
            if name in owner.active_adapters and (ratio := getattr(adapter.method, "plus", None)) not in (None, 1):
                rank_zero_warn(
                    f"LoRA(plus={ratio}) of {name!r} has no effect: the optimizer was made without "
                    "`self.parameter_groups(lr=...)`, which has LoRA+'s learning rates. Give it those groups in "
                    "`configure_optimizers`, or leave `plus` out."
                )


def groups(owner: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters of `owner` by learning rate; LoRA+'s are those of its adapters' options."""
    vars(owner)[_GROUPED] = True
    faster: dict[int, float] = {}
    for prefix, held in vars(owner).get("_adapted", {}).items():
        for _, layer in adapted_layers(owner.get_submodule(prefix)):
            for name in layer.adapters:
                ratio = getattr(held[name].method, "plus", None) if name in held else None
                if ratio is not None and "lora_B" in layer.adapter_parameters(name):
                    faster[id(layer.own("lora_B", name))] = ratio
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in owner.parameters():
        if parameter.requires_grad:
            found.setdefault(faster.get(id(parameter), 1.0), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * ratio, "weight_decay": weight_decay}
        for ratio, parameters in sorted(found.items())
    ]
