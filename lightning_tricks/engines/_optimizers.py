"""The optimizers that a strategy cannot step as one device does: refused before the first step."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_tricks.errors import UnsupportedError

__all__ = ["refuse_closures", "refuse_several"]

_NO_CLOSURE = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def refuse_several(optimizers: Sequence[Optimizer], schedules: Sequence[Any]) -> None:
    """Refuse what a ZeRO engine cannot hold: several optimizers, or several learning-rate schedules."""
    for what, found in (("optimizer", optimizers), ("learning-rate schedule", schedules)):
        if len(found) > 1:
            raise UnsupportedError(
                f"Training with {len(found)} {what}s",
                "ZeRO",
                f"a DeepSpeed engine has one {what}",
                "put all parameters into the parameter groups of one, or use `strategy='fsdp2'` or 'ddp'",
            )


def refuse_closures(optimizers: Sequence[Optimizer], where: str) -> None:
    """Refuse optimizers whose `step` needs a closure, as that of LBFGS does.

    They decide by the loss that the closure returns how often they evaluate it and how far they go. Each rank has a
    loss of its own, so the ranks would part ways.
    """
    for optimizer in optimizers:
        closure = inspect.signature(optimizer.step).parameters.get("closure", _NO_CLOSURE)
        if closure.default is inspect.Parameter.empty:
            raise UnsupportedError(
                type(optimizer).__name__,
                where,
                "it steers by the loss of its closure, which each rank has its own of",
                "use a first-order optimizer, or train on one device",
            )
