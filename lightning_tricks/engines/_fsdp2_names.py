"""Which weights a checkpoint folder of FSDP2 holds, beside those that the module asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_tricks.engines._flat import plain_name
from lightning_tricks.errors import CheckpointError

__all__ = ["asking_for_its_weights", "keys_of", "own_name", "refuse_other_names"]

_COMPILED = "_orig_mod."
_WEIGHTS = "state_dict."


@contextmanager
def asking_for_its_weights(module: LightningModule, path: Path) -> Iterator[None]:
    """Within the block the module asks a folder for the weights that it holds, as `strict_loading` says.

    Torch fails at the first weight that the folder lacks, strict or not, and passes over what the module lacks.

    Args:
        module: in its strategy.
        path: a checkpoint folder.

    Raises:
        CheckpointError: if loading is strict and either has a weight that the other lacks, which is named.
    """
    held = {own_name(key.removeprefix(_WEIGHTS)) for key in keys_of(path) if key.startswith(_WEIGHTS)}
    if module.strict_loading:
        refuse_other_names(module, path, held)

    def leave_out(_module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        for name in [name for name in state if own_name(name) not in held]:
            del state[name]

    hook = module.register_state_dict_post_hook(leave_out)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()


def refuse_other_names(module: LightningModule, path: Path, saved: set[str]) -> None:
    """Refuse a checkpoint that has a weight which the module's state dict has not, or lacks one that it has.

    Raises:
        CheckpointError: naming the first.
    """
    if differing := sorted(saved ^ {own_name(name) for name in module.state_dict()}):
        where = "module" if differing[0] in saved else "checkpoint"
        name = type(module).__name__.removeprefix("FSDP")  # which sharding puts before it
        raise CheckpointError(
            f"{path} does not fit {name}: `{differing[0]}` is not in the {where}. Load one of this very model, or set"
            " `strict_loading=False` in it."
        )


def keys_of(path: Path) -> list[str]:
    """Under what keys a checkpoint folder holds tensors."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return list(FileSystemReader(path).read_metadata().state_dict_metadata)


def own_name(name: str) -> str:
    """A name without what sharding, recomputation and compilation put into it."""
    return plain_name(name).replace(_COMPILED, "")
