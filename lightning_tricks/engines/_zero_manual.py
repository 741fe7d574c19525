"""Manual optimisation under ZeRO: gradients add up until the module calls `step()`, as on one device."""

from collections.abc import Iterable
from typing import Any

from lightning_tricks.errors import UnsupportedError

__all__ = ["ManualWindow"]


class ManualWindow:
    """The backwards between two steps.

    DeepSpeed must know at each backward whether it is the last one before a step; in manual optimisation nobody does.
    So none of them is the last, and what DeepSpeed puts off until the last one is done when `step()` is called.

    Args:
        engine: the DeepSpeed engine.
        stage: 1, 2 or 3.
        wrappers: Lightning's wrappers of its optimizer, which `self.optimizers()` gives to the module. They run the
            optimizer's own `zero_grad` on themselves, which would leave the optimizer's counters as they are.
    """

    def __init__(self, engine: Any, stage: int, wrappers: Iterable[Any]) -> None:
        self.engine = engine
        self._stage = stage
        self._backwards = 0
        for wrapper in wrappers:
            wrapper.zero_grad = self._zero_grad

    def before_backward(self) -> None:
        """Keep the window open, and tell DeepSpeed that this is a new backward, also within the same training step."""
        self._backwards += 1
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.optimizer.clear_backward_seen_flag()

    def finish(self) -> None:
        """Do what the last backward before a step does: reduce the gradients, or lay them out for the optimizer."""
        self.engine.set_gradient_accumulation_boundary(True)
        if self._backwards and self._stage == 1:
            self.engine._flush_coalesced_reduction_zero12(self.engine.optimizer)
        elif self._backwards:
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
        self._backwards = 0

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was added up since the last step. ZeRO-2 keeps it where its own `zero_grad` does not reach."""
        if self._backwards and self._stage == 2:
            raise UnsupportedError(
                "`zero_grad()` between a backward and its step",
                "zero_2",
                "DeepSpeed has added that gradient to the window already",
                "call it after `step()`, or use `strategy='zero_1'` or 'zero_3'",
            )
        self.engine.optimizer.zero_grad(set_to_none)
        self._backwards = 0
