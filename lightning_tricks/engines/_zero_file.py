"""A single file's weights in a module that ZeRO holds: of one device, DDP, or an ensemble."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_tricks.engines._universal import put
from lightning_tricks.errors import CheckpointError

__all__ = ["put_whole", "refuse_resuming"]


def refuse_resuming(module: LightningModule, path: Path) -> None:
    """Refuse to go on with a fit from a file."""
    if module.trainer.state.fn == "fit":
        raise CheckpointError(
            f"{path} is a single file, whose optimizer state ZeRO cannot divide: it resumes from the folders that it"
            " wrote. Resume on one device or with strategy='ddp', or start from the file's weights with"
            " `load_from_checkpoint`."
        )


def put_whole(module: LightningModule, state: Mapping[str, Any], path: Path, strict: bool) -> None:
    """Write a state dict of whole tensors into the module; under ZeRO-3 each rank keeps its part of each.

    Args:
        module: outside a fit, so that there are no masters beside its parameters.
        state: the plain module's state dict.
        path: where it was read.
        strict: whether both must have the same names.

    Raises:
        CheckpointError: if a name is missing or too many, or a shape differs; the first one is named.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        module.load_state_dict(state, strict=strict)
        return
    own: dict[str, Any] = dict(module.named_buffers(remove_duplicate=False))
    own.update(module.named_parameters(remove_duplicate=False))
    if strict and (differing := sorted(set(state) ^ set(module.state_dict()))):
        where = "module" if differing[0] in state else "checkpoint"
        raise _misfit(path, module, f"`{differing[0]}` is not in the {where}")
    fitting = {name: value for name, value in state.items() if name in own}
    for name, value in fitting.items():
        found, wanted = list(value.shape), list(getattr(own[name], "ds_shape", own[name].shape))
        if found != wanted:
            raise _misfit(path, module, f"`{name}` is of shape {found} in it and {wanted} in the module")
    with torch.no_grad():
        for name, value in fitting.items():
            put(own[name], value)


def _misfit(path: Path, module: LightningModule, how: str) -> CheckpointError:
    return CheckpointError(f"{path} does not fit {type(module).__name__}: {how}. Load one of this very model.")
