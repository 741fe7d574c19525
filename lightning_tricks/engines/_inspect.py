"""What a checkpoint says of itself, without running anything that it holds."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tricks.engines._consolidate import find_weights
from lightning_tricks.engines._read import explained
from lightning_tricks.engines._skim import Inert, skim
from lightning_tricks.engines._zero_files import zero_files
from lightning_tricks.storage import WeightsFile

__all__ = ["CheckpointFacts", "inspect_checkpoint"]


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint in short.

    Attributes:
        engine: which kind of engine wrote it.
        ranks: how many processes wrote files of it.
        step: the optimizer steps taken, if it says so.
        epoch: the epoch it was saved in, if it says so.
        lightning: Lightning's version, if it says so.
        tensors: how many tensors the module has in it.
        elements: their elements, by dtype.
        weights_bytes: what they take as whole tensors.
        disk_bytes: what the file or folder takes.
        resumable: whether a training run can go on from it.
        callbacks: those that have state in it.
        hyper_parameters: their names.
        base_tensors: frozen tensors that an adapter's checkpoint leaves out; `None` if it is no adapter's.
    """

    engine: str
    ranks: int
    step: int | None
    epoch: int | None
    lightning: str | None
    tensors: int
    elements: Mapping[str, int]
    weights_bytes: int
    disk_bytes: int
    resumable: bool
    callbacks: list[str] = field(default_factory=list)
    hyper_parameters: list[str] = field(default_factory=list)
    base_tensors: int | None = None


def inspect_checkpoint(path: str | Path) -> CheckpointFacts:
    """Read what a checkpoint of any engine says of itself: no tensor is read, no class in it imported, nothing run.

    Args:
        path: a checkpoint file of one device or DDP, a ZeRO folder, an FSDP2 folder, or a safetensors file.

    Raises:
        CheckpointError: if there is no checkpoint, or it is truncated, incomplete or not of these kinds.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "plain.ckpt"
        >>> torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 3}, path)
        >>> facts = inspect_checkpoint(path)
        >>> facts.engine, facts.step, facts.elements
        ('one device or DDP', 3, {'float32': 2})
    """
    path = Path(path)
    with explained(path):
        weights = find_weights(path)
        engine, ranks, content = _content(path)
    elements: Counter[str] = Counter()
    for whole in weights.values():
        elements[f"{whole.dtype}".removeprefix("torch.")] += whole.numel()
    base = _mapping(_mapping(content.get("lightning_tricks")).get("base"))
    return CheckpointFacts(
        engine=engine,
        ranks=ranks,
        step=_number(content.get("global_step")),
        epoch=_number(content.get("epoch")),
        lightning=content.get("pytorch-lightning_version"),
        tensors=len(weights),
        elements=dict(elements),
        weights_bytes=sum(whole.nbytes() for whole in weights.values()),
        disk_bytes=sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()),
        resumable="loops" in content and (path.is_dir() or "optimizer_states" in content),
        callbacks=[str(name) for name in _mapping(content.get("callbacks"))],
        hyper_parameters=[str(name) for name in _mapping(content.get("hyper_parameters"))],
        base_tensors=len(base) if "base" in _mapping(content.get("lightning_tricks")) else None,
    )


def _content(path: Path) -> tuple[str, int, Mapping[str, Any]]:
    """The engine, the ranks that wrote, and all but the weights."""
    if path.suffix == ".safetensors":
        metadata = WeightsFile(path).metadata
        return "safetensors", 1, {name: metadata[name] for name in metadata if name in ("global_step", "epoch")}
    if path.is_file():
        return "one device or DDP", 1, skim(path)
    if (path / ".metadata").exists():
        ranks = {match[1] for file in path.glob("*.distcp") if (match := re.match(r"__(\d+)_", file.name))}
        return "FSDP2", len(ranks), skim(path / "meta.pt")
    stage, models, states = zero_files(path)
    return f"ZeRO-{stage}" if stage else "DeepSpeed without ZeRO", max(len(models), len(states)), models[0]


def _mapping(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Inert):  # a configuration object: its attributes
        value = value.state
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, int | str) and str(value).isdigit() else None
