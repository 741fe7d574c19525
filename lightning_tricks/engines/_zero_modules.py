"""A module handed to DeepSpeed, and what DeepSpeed left on it when another Trainer had it."""

import argparse
import weakref
from collections.abc import Iterator
from typing import Any

from torch.nn import Module

__all__ = ["initialize"]

_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
)
_TRACES = "_lightning_tricks_zero"  # what DeepSpeed put on a module: kept with it, since the next Trainer needs it


def initialize(model: Module, config: dict[str, Any], device_rank: int, **options: Any) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer for a module that no other engine of DeepSpeed's holds on to afterwards.

    Args:
        model: the module.
        config: DeepSpeed's configuration.
        device_rank: which of the machine's devices is this process's.
        options: passed on to `deepspeed.initialize`.
    """
    import deepspeed

    _forget_training(model)
    before = {(id(hooks), key) for hooks, key in _hooks(model)}
    engine, optimizer, _, _ = deepspeed.initialize(
        args=argparse.Namespace(device_rank=device_rank),
        config=config,
        model=model,
        dist_init_required=False,
        **options,
    )
    added = [(hooks, key) for hooks, key in _hooks(model) if (id(hooks), key) not in before]
    vars(model)[_TRACES] = (weakref.ref(engine), added)
    return engine, optimizer


def _forget_training(model: Module) -> None:
    """Take off what DeepSpeed put on the module, whichever Trainer fitted it, and nobody else's hooks.

    DeepSpeed leaves its hooks behind, and a second fit would run into the first one's. Its engine is ended now and
    not when it happens to be collected: that would take the next engine's masters off the parameters.
    """
    engine, added = vars(model).pop(_TRACES, (lambda: None, ()))
    if (past := engine()) is not None:
        past.destroy()
        past.destroy = lambda: None
    for hooks, key in added:
        hooks.pop(key, None)
    for parameter in model.parameters():
        for name in ("_hp_mapping", "_z3_optimizer"):
            if hasattr(parameter, name):
                delattr(parameter, name)


def _hooks(model: Module) -> Iterator[tuple[dict[int, Any], int]]:
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name)
            yield from ((hooks, key) for key in list(hooks))
