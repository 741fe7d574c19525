"""A rank's share of the batches of a dropped step, in a file to look at later."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tricks.storage._atomic import atomic_file
from lightning_tricks.storage._space import disk_errors

__all__ = ["portable", "write_batches"]


def write_batches(path: Path, batches: list[Any], facts: Mapping[str, Any]) -> None:
    """Write `{"batches": [...], **facts}`; the file appears when it is complete.

    Raises:
        CheckpointError: if the disk refuses it.
    """
    content = {**facts, "batches": [portable(batch) for batch in batches]}
    with disk_errors(path), atomic_file(path) as partial, partial.open("wb") as stream:
        torch.save(content, stream)


def portable(value: Any) -> Any:
    """The value with its tensors on the CPU, apart from their graph; what cannot be pickled becomes its `repr`.

    Example:
        >>> portable({"x": torch.ones(2, requires_grad=True), "f": open})["x"]
        tensor([1., 1.])
        >>> portable([len, 3, lambda: 0])[2].startswith("<function")
        True
    """
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would take its whole storage along
    if type(value) is dict:
        return {key: portable(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(portable(entry) for entry in value)
    return value if _can_be_pickled(value) else repr(value)


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # whatever a class's own `__reduce__` raises
        return False
    return True
