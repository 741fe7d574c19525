"""`average`: the mean of checkpoints of any engine."""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from rich.console import Console

from lightning_tricks.engines import open_checkpoint
from lightning_tricks.errors import CheckpointError
from lightning_tricks.inference import average_checkpoints

__all__ = ["average", "module_for"]


def average(arguments: list[str]) -> int:
    """Write the mean of the weights of some checkpoints.

    Args:
        arguments: the checkpoints, `--out`, `--weights`, `--ignore`, `--skip-bad`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        MisconfigurationError: for an option out of range.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> for value in (1.0, 2.0):
        ...     torch.save({"state_dict": {"w": torch.tensor(value)}}, folder / f"{value}.ckpt")
        >>> average([f"{folder}/1.0.ckpt", f"{folder}/2.0.ckpt", "--out", f"{folder}/mean.ckpt"])
        0
    """
    parser = ArgumentParser("lightning-tricks average", description="The mean of checkpoints of any engine.")
    parser.add_argument("checkpoints", type=Path, nargs="+", help="files, or folders that ZeRO or FSDP2 wrote")
    parser.add_argument("--out", type=Path, required=True, help="the .ckpt or .safetensors file to write")
    parser.add_argument("--weights", type=float, nargs="+", help="a number for each checkpoint; all alike by default")
    parser.add_argument("--ignore", nargs="+", default=[], help="hyper-parameters that may differ, such as `name`")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what is damaged or does not match")
    chosen = parser.parse_args(arguments)
    done = average_checkpoints(
        chosen.checkpoints,
        chosen.out,
        weights=chosen.weights,
        ignore=chosen.ignore,
        skip_bad=chosen.skip_bad,
        module=module_for(chosen.checkpoints),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    for path, reason in done.skipped.items():
        console.print(f"Left out `{path}`: {reason}")
    console.print(f"Wrote `{done.path}`, the mean of {len(done.members)} checkpoints.")
    return 0


def module_for(paths: Sequence[Path]) -> LightningModule | None:
    """What the adapters in checkpoints are merged into: a new TextClassifier; None if there are none, or of others.

    Args:
        paths: the checkpoints. It is built as the first one says that can be opened; those that cannot are for
            `average_checkpoints` to refuse or to leave out.
    """
    for path in paths:
        try:
            stored = open_checkpoint(path)
        except CheckpointError:
            continue
        adapted = any(name.endswith(".lora_A") for name in stored.weights)
        return _classifier(stored.rest, path) if adapted and "hyper_parameters" in stored.rest else None
    return None


def _classifier(rest: Mapping[str, Any], path: Path) -> LightningModule | None:
    from lightning_tricks.cli.prediction import build_classifier

    try:
        return build_classifier(rest, path)
    except (CheckpointError, ImportError, AttributeError):  # of another kind, or of a class that cannot be found here
        return None
