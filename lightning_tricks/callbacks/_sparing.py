"""Backward passes without the gradients of frozen layers, where the engine does not wait for them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

__all__ = ["Sparing"]


class Sparing:
    """From each training step until its backward pass has ended, the frozen parameters require no gradient.

    Outside of that they require one as ever: for whoever asks what is trained, other callbacks and checkpoints say.

    Args:
        module: whose `training_step` is watched until `leave`.
        frozen: the parameters that are frozen now.
    """

    def __init__(self, module: LightningModule, frozen: Callable[[], Sequence[Tensor]]) -> None:
        self._module, self._frozen = module, frozen
        self._spared: list[Tensor] = []
        self._own = vars(module).get("training_step")
        step = module.training_step

        @functools.wraps(step)
        def stepped(*arguments: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():  # not where a forward pass is all that is asked for
                self._begin()
            return step(*arguments, **options)

        self._stepped = stepped
        vars(module)["training_step"] = stepped

    def end(self) -> None:
        """After the backward pass, or instead of it."""
        for parameter in self._spared:
            parameter.requires_grad_(True)
        self._spared = []

    def leave(self) -> None:
        """Leave the module as it was found."""
        self.end()
        if vars(self._module).get("training_step") is self._stepped:
            vars(self._module).pop("training_step")
            if self._own is not None:
                vars(self._module)["training_step"] = self._own

    def _begin(self) -> None:
        self._spared = [parameter for parameter in self._frozen() if parameter.requires_grad]
        for parameter in self._spared:
            parameter.requires_grad_(False)
