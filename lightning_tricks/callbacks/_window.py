"""What a guard knows of the accumulation window under way."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

__all__ = ["Statistics", "Window", "where"]


class Window:
    """The batches whose gradients accumulate into one step, and whether a loss among them is not finite."""

    def __init__(self) -> None:
        self.epoch = 0
        self.indices: list[int] = []
        self.batches: list[Any] = []
        self.bad: Tensor | None = None
        self.stepped = False

    def add(self, epoch: int, index: int, batch: Any) -> None:
        """One more batch; None: only its index is kept."""
        self.epoch = epoch
        self.indices.append(index)
        if batch is not None:
            self.batches.append(batch)

    def see(self, loss: Tensor) -> None:
        """A loss, whose value is not read here: that would wait."""
        bad = ~loss.detach().isfinite().all()
        self.bad = bad if self.bad is None else self.bad | bad


class Statistics:
    """The running statistics of normalisations as a window found them: a forward pass on a bad batch spoils them."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []

    def keep(self, module: LightningModule) -> None:
        """Copy them, on the device."""
        norms = [part for part in module.modules() if isinstance(getattr(part, "running_mean", None), Tensor)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    def put_back(self) -> None:
        """Make them what they were, in place."""
        with torch.no_grad():
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept)


def where(window: Window, ranks: list[int]) -> str:
    """The batches of a dropped step and what was wrong, in words.

    Example:
        >>> window = Window()
        >>> window.add(0, 4, None)
        >>> where(window, [])
        'epoch 0, batch 4 (the gradient)'
        >>> window.add(0, 5, None)
        >>> where(window, [1])
        'epoch 0, batches 4 to 5 (the loss on rank 1)'
    """
    first, last = window.indices[0], window.indices[-1]
    batches = f"batch {first}" if first == last else f"batches {first} to {last}"
    what = f"the loss on rank {', '.join(map(str, ranks))}" if ranks else "the gradient"
    return f"epoch {window.epoch}, {batches} ({what})"
