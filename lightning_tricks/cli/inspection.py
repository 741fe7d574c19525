"""`inspect`: what a checkpoint holds, without running anything in it."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_tricks.engines import CheckpointFacts, inspect_checkpoint

__all__ = ["inspect"]


def inspect(arguments: list[str]) -> int:
    """Print the engine, the step, the dtypes, the sizes and the callbacks of a checkpoint.

    Args:
        arguments: the checkpoint.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is incomplete.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 3}, path)
        >>> inspect([str(path)])  # doctest: +ELLIPSIS
        engine...one device or DDP...
        0
    """
    parser = ArgumentParser("lightning-tricks inspect", description="What a checkpoint holds; nothing in it is run.")
    parser.add_argument("checkpoint", type=Path, help="a file, or the folder that ZeRO or FSDP2 wrote")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, text in _rows(inspect_checkpoint(parser.parse_args(arguments).checkpoint)):
        table.add_row(name, escape(text))
    Console(file=sys.stdout, highlight=False).print(table)
    return 0


def _rows(facts: CheckpointFacts) -> Iterator[tuple[str, str]]:
    yield "engine", facts.engine
    yield "written by", f"{facts.ranks} process{'' if facts.ranks == 1 else 'es'}"
    yield "step", _told(facts.step)
    yield "epoch", _told(facts.epoch)
    yield "Lightning", _told(facts.lightning)
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts.elements.items())
    yield "weights", f"{facts.tensors} tensors, {_size(facts.weights_bytes)}: {dtypes or 'none'}"
    yield "on the disk", _size(facts.disk_bytes)
    yield "goes on from here", "yes" if facts.resumable else "no, it holds weights only"
    yield "callbacks", ", ".join(facts.callbacks) or "none"
    yield "hyper-parameters", ", ".join(facts.hyper_parameters) or "none"
    if facts.base_tensors is not None:
        yield "adapter's base", f"{facts.base_tensors} frozen tensors, which are not in the checkpoint"


def _told(value: object) -> str:
    return "not stored" if value is None else f"{value}"


def _size(count: int) -> str:
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    size, unit = float(count), next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
