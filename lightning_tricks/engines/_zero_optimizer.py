"""Optimizers that ZeRO cannot run, and parameters that an optimizer does not hold: refused before the first step."""

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers, _MockOptimizer
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.nn import Module
from torch.optim import Optimizer

from lightning_tricks.engines._optimizers import refuse_closures, refuse_several
from lightning_tricks.errors import MisconfigurationError, UnsupportedError

__all__ = ["configured_optimizer", "refuse_changed", "refuse_optimizer", "refuse_untrainable"]

# Class name, in lower case -> why ZeRO, which gives an optimizer flat pieces of the parameters, cannot run it.
_WHOLE = "its update looks at a whole tensor, its shape or its norm, and ZeRO gives it flat pieces"
_REFUSED = {
    "sparseadam": "it takes sparse gradients only, and ZeRO's are dense",
    **dict.fromkeys(("adafactor", "lamb", "lars", "muon", "shampoo", "soap"), _WHOLE),
}


def refuse_untrainable(module: Module) -> None:
    """Refuse a module without a parameter to train."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise MisconfigurationError(
            f"{type(module).__name__} has no parameter that requires a gradient, so there is nothing to train: call"
            " `requires_grad_(True)` on a part of it."
        )


def configured_optimizer(module: LightningModule) -> tuple[Optimizer | None, LRSchedulerConfig | None]:
    """What `configure_optimizers` returns: one optimizer or none, and at most one schedule."""
    optimizers, schedules = _init_optimizers_and_lr_schedulers(module)
    refuse_several(optimizers, schedules)
    refuse_closures(optimizers, "ZeRO")
    optimizer = None if isinstance(optimizers[0], _MockOptimizer) else optimizers[0]
    return optimizer, schedules[0] if schedules else None


def refuse_optimizer(module: Module, optimizer: Optimizer, engine: str) -> None:
    """Refuse an optimizer that computes something else on flat pieces, or holds other parameters than the module."""
    for kind in type(optimizer).__mro__:
        reason = _REFUSED.get(kind.__name__.lower())
        if reason and not kind.__module__.startswith("deepspeed."):
            instead = "use an elementwise optimizer such as AdamW or SGD, or `strategy='ddp'`"
            raise UnsupportedError(type(optimizer).__name__, engine, reason, instead)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            raise MisconfigurationError(
                f"`{name}` of {type(module).__name__} requires a gradient, but the {type(optimizer).__name__} does not"
                " hold it: give it to the optimizer, or call `requires_grad_(False)` on it. If it was replaced after"
                " the optimizer was built, build the optimizer in `configure_optimizers`."
            )
    _refuse_strangers(module, optimizer)


def _refuse_strangers(module: Module, optimizer: Optimizer) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise MisconfigurationError(
                    f"Group {index} of the {type(optimizer).__name__} holds a parameter of shape"
                    f" {tuple(parameter.shape)} that is not in {type(module).__name__}: build the optimizer in"
                    " `configure_optimizers`, of the module's own parameters."
                )


def refuse_changed(module: Module, trained: dict[str, int]) -> None:
    """Refuse a module whose trained parameters are not those, by name and identity, that the engine was built with."""
    now = {name: id(parameter) for name, parameter in module.named_parameters() if parameter.requires_grad}
    changed = [name for name in {**trained, **now} if trained.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        what = "was added or unfrozen" if name not in trained else "was taken away or frozen"
        raise MisconfigurationError(
            f"`{name}` of {type(module).__name__} {what if name not in now or name not in trained else 'was replaced'}"
            " after ZeRO divided the parameters: change the module in `__init__`, `configure_model` or a callback's"
            " `setup`, and freeze no part of it later."
        )
