"""Activation checkpointing of a module's blocks: their inputs are kept, and the rest is computed again."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from torch import nn

from lightning_tricks.engines._blocks import find_blocks
from lightning_tricks.errors import MisconfigurationError

__all__ = ["checkpoint_blocks", "checkpoints_blocks", "refuse_activation_checkpointing"]

_DONE: "WeakSet[nn.Module]" = WeakSet()


def refuse_activation_checkpointing(value: object) -> None:
    """Refuse any value of the option but None and `"blocks"`."""
    if value not in (None, "blocks"):
        raise MisconfigurationError(f"`activation_checkpointing` must be 'blocks' or None, got {value!r}.")


def checkpoint_blocks(module: nn.Module, names: Sequence[str] = ()) -> None:
    """Let every block be computed again in the backward pass. A second call changes nothing.

    A Hugging Face model does it by its own method, with its cache of keys and values off. All other blocks do it
    through hooks. Never reentrant: with that, a block whose inputs need no gradient (behind frozen embeddings) would
    give its parameters none.

    Args:
        module: the module in training.
        names: class names of the blocks; empty: see `find_blocks`.

    Raises:
        MisconfigurationError: if there is no block, or a name is not in the module.
    """
    if module in _DONE:
        return
    models = [] if names else [part for part in module.modules() if _checkpoints_itself(part)]
    theirs = {id(part) for model in models for part in model.modules()}
    blocks = [block for block in find_blocks(module, names) if id(block) not in theirs]
    if not models and not blocks:
        raise MisconfigurationError(
            f"`activation_checkpointing='blocks'` found no repeated block in {type(module).__name__}: put its layers"
            " into a `ModuleList`, or leave the option out and call `torch.utils.checkpoint.checkpoint` in the module."
        )
    for model in models:
        _let_model_checkpoint(model)
    for block in blocks:
        _checkpoint(block)
    _DONE.add(module)


def checkpoints_blocks(module: nn.Module) -> bool:
    """Whether `checkpoint_blocks` was called on the module before."""
    return module in _DONE


def _checkpoints_itself(part: Any) -> bool:
    return bool(getattr(part, "supports_gradient_checkpointing", False)) and hasattr(
        part, "gradient_checkpointing_enable"
    )


def _let_model_checkpoint(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name in transformers 5.x; the other warns there
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False


def _checkpoint(block: nn.Module) -> None:
    from torch.distributed._composable.checkpoint_activation import checkpoint

    checkpoint(block)
