"""Activation checkpointing of a module's blocks: their inputs are kept, and the rest is computed again."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from lightning_tricks.engines._blocks import find_blocks, outermost
from lightning_tricks.errors import MisconfigurationError

__all__ = ["Recomputed", "checkpoint_blocks", "checkpoints", "recomputes", "refuse_activation_checkpointing"]

Recomputed = Literal["blocks"] | Sequence[str] | Callable[[nn.Module], bool]
# The modules that were done, and of each what is computed again. Names are kept beside it: sharding changes classes.
_DONE: "WeakKeyDictionary[nn.Module, tuple[tuple[str, ...] | None, WeakSet[nn.Module]]]" = WeakKeyDictionary()


def refuse_activation_checkpointing(value: Any) -> None:
    """Refuse any value of the option but None, `"blocks"`, a list of class names and a function."""
    if value is None or value == "blocks" or callable(value):
        return
    if isinstance(value, str):
        raise MisconfigurationError(
            f"`activation_checkpointing` must be 'blocks' or a list of class names, got {value!r}: write [{value!r}]."
        )
    if not (isinstance(value, Sequence) and value and all(isinstance(name, str) for name in value)):
        raise MisconfigurationError(
            "`activation_checkpointing` must be 'blocks', a list of class names, a function of a module or None, got"
            f" {value!r}."
        )


def checkpoint_blocks(module: nn.Module, policy: Recomputed, names: Sequence[str] = ()) -> None:
    """Let parts of a module be computed again in the backward pass. A second call with the same policy changes nothing.

    Under `"blocks"` a Hugging Face model does it by its own method. All else is done through hooks, also to a Hugging
    Face model's layers where the policy chooses them. Its cache of keys and values is turned off. Never reentrant: with
    that, a block whose inputs need no gradient (behind frozen embeddings) would give its parameters none.

    Args:
        module: the module in training.
        policy: `"blocks"`, the class names of the parts, or a function that is true of the parts. A part within a part
            is computed again with it.
        names: class names of the blocks; empty: see `find_blocks`.

    Raises:
        MisconfigurationError: if the policy finds nothing, a name is not in the module, or another was used before.
    """
    if module in _DONE:
        _refuse_another(module, policy)
        return
    models = [part for part in module.modules() if _checkpoints_itself(part)]
    own = models if policy == "blocks" and not names else []
    theirs = {id(part) for model in own for part in model.modules()}
    chosen = find_blocks(module, names) if policy == "blocks" else _chosen(module, policy)
    blocks = [block for block in chosen if id(block) not in theirs]
    if not own and not blocks:
        raise _found_nothing(module, policy)
    for model in own:
        _let_model_checkpoint(model)
    for block in blocks:
        _checkpoint(block)
    for model in models:
        _turn_cache_off(model, blocks)
    _DONE[module] = (_names(policy), WeakSet(blocks))


def checkpoints(module: nn.Module, policy: Recomputed) -> bool:
    """Whether `checkpoint_blocks` was called on the module before, with this policy."""
    if module not in _DONE:
        return False
    known, parts = _DONE[module]
    if _names(policy) is None:
        return known is None and set(parts) == set(_chosen(module, policy))
    return known == _names(policy)


def recomputes(module: nn.Module) -> bool:
    """Whether `checkpoint_blocks` lets a part of the module be computed again, through hooks of its own.

    Costs a look at every part.
    """
    parts = {id(part) for _, blocks in _DONE.values() for part in blocks}
    return bool(parts) and any(id(part) in parts for part in module.modules())


def _names(policy: Recomputed) -> tuple[str, ...] | None:
    if isinstance(policy, str):
        return (policy,)
    return None if callable(policy) else ("by name", *policy)


def _chosen(module: nn.Module, policy: Recomputed) -> list[nn.Module]:
    parts = [part for part in module.modules() if part is not module]
    if callable(policy):
        return outermost([part for part in parts if policy(part)])
    present = {type(part).__name__ for part in parts}
    if missing := sorted(set(policy) - present):
        raise MisconfigurationError(
            f"`activation_checkpointing` names {missing[0]!r}, which {type(module).__name__} does not contain. It"
            f" contains: {', '.join(sorted(present))}."
        )
    return outermost([part for part in parts if type(part).__name__ in policy])


def _refuse_another(module: nn.Module, policy: Recomputed) -> None:
    if not checkpoints(module, policy):
        raise MisconfigurationError(
            f"`activation_checkpointing` chose other parts of {type(module).__name__} in an earlier fit, and they stay:"
            " choose the same again, or build the module anew."
        )


def _found_nothing(module: nn.Module, policy: Recomputed) -> MisconfigurationError:
    what = "repeated block" if policy == "blocks" else "part"
    return MisconfigurationError(
        f"`activation_checkpointing={getattr(policy, '__name__', policy)!r}` found no {what} in"
        f" {type(module).__name__}: put its layers into a `ModuleList`, or leave the option out and call"
        " `torch.utils.checkpoint.checkpoint` in the module."
    )


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
    _turn_cache_off(model, [model])


def _turn_cache_off(model: Any, blocks: Iterable[nn.Module]) -> None:
    """A layer that is computed again would put its keys and values into the cache again."""
    if hasattr(model.config, "use_cache") and not {id(block) for block in blocks}.isdisjoint(map(id, model.modules())):
        model.config.use_cache = False


def _checkpoint(block: nn.Module) -> None:
    from torch.distributed._composable.checkpoint_activation import checkpoint

    checkpoint(block)
