"""What a checkpoint may hold beside tensors and plain types: hyper-parameters of OmegaConf, and paths."""

import collections
import pathlib
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["allow_hyper_parameters"]


@contextmanager
def allow_hyper_parameters() -> Iterator[None]:
    """Let torch load OmegaConf's containers and `pathlib`'s paths within the block, under `weights_only=True`.

    Both are data: to make them runs no code of the file. The suite's own reading and resuming does it by itself;
    Lightning's `load_from_checkpoint` does not. Objects of other classes stay refused: allow those that you trust with
    `torch.serialization.add_safe_globals`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "plain.ckpt"
        >>> torch.save({"hyper_parameters": {"folder": Path("texts")}}, file)
        >>> with allow_hyper_parameters():
        ...     torch.load(file, weights_only=True)["hyper_parameters"]["folder"].name
        'texts'
    """
    known = torch.serialization.get_safe_globals()  # torch would forget these too when the block ends
    with torch.serialization.safe_globals([found for found in _types() if found not in known]):
        yield


def _types() -> list[Any]:
    from omegaconf import DictConfig, ListConfig, nodes
    from omegaconf.base import ContainerMetadata, Metadata, Node

    leaves = [found for found in vars(nodes).values() if isinstance(found, type) and issubclass(found, Node)]
    plain = [typing.Any, collections.defaultdict, bool, bytes, dict, float, int, list, str, tuple]
    paths = [pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath]
    return [*plain, *paths, DictConfig, ListConfig, ContainerMetadata, Metadata, *leaves]
