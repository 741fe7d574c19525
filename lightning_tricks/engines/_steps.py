"""Which optimizer steps really ran, on engines whose optimizers are torch's."""

import weakref
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["watch_steps"]


class _Watcher(Protocol):
    def step_ran(self, optimizer: Optimizer) -> None: ...


_WATCHERS: "weakref.WeakSet[Any]" = weakref.WeakSet()
_HOOKED: list[Any] = []


def watch_steps(watcher: _Watcher) -> None:
    """Tell `watcher`, for as long as it lives, of every optimizer whose `step()` has run; a scaler may leave it out.

    One hook serves all watchers and stays, since a hook taken away while others run would break their loop.
    """
    _WATCHERS.add(watcher)
    if not _HOOKED:
        _HOOKED.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for watcher in list(_WATCHERS):
        watcher.step_ran(optimizer)
