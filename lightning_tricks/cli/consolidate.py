"""`consolidate`: the checkpoint of any engine as one safetensors file."""

from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_tricks.engines import consolidate

__all__ = ["consolidate_checkpoint"]


def consolidate_checkpoint(arguments: list[str]) -> int:
    """Write one safetensors file that loads strictly into the plain module.

    Args:
        arguments: the checkpoint, and the file to write.

    Raises:
        CheckpointError: if there is no such checkpoint, it is incomplete, or the file cannot be written.
        MisconfigurationError: if the file's name does not end in `.safetensors`.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"state_dict": {"w": torch.ones(2)}}, folder / "last.ckpt")
        >>> consolidate_checkpoint([f"{folder}/last.ckpt", f"{folder}/last.safetensors"])
        0
    """
    parser = ArgumentParser("lightning-tricks consolidate", description="Any engine's checkpoint as one file.")
    parser.add_argument("checkpoint", type=Path, help="a file, or the folder that ZeRO or FSDP2 wrote")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    chosen = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Consolidating", total=None)
        consolidate(
            chosen.checkpoint,
            chosen.out,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(f"Wrote `{chosen.out}`, {chosen.out.stat().st_size / 1e6:.1f} MB.")
    return 0
