"""`soup`: of some checkpoints, the mean of those that do not make it worse."""

import copy
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_tricks.cli.training import TricksCLI
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import infer_mode
from lightning_tricks.inference import greedy_soup

__all__ = ["BuiltCLI", "soup"]


class BuiltCLI(TricksCLI):
    """Builds what a configuration says, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: the objects are what is wanted."""


def soup(arguments: list[str]) -> int:
    """Average checkpoints greedily by what they score on the validation split of a configuration.

    Args:
        arguments: the checkpoints, `--out`, `--monitor`, `--mode`, `--ignore`, `--skip-bad`, and LightningCLI's
            options: `--config`.

    Raises:
        CheckpointError: naming the file and what is wrong with it, before anything is scored.
        MisconfigurationError: for a metric that validation does not log, or an option out of range.
    """
    parser = ArgumentParser(
        "lightning-tricks soup",
        description="The mean of those checkpoints that do not make it worse, scored on the validation split. Further"
        " options, such as --config, --data.path and --trainer.accelerator, are those of `lightning-tricks validate`.",
    )
    parser.add_argument("checkpoints", type=Path, nargs="+", help="files, or folders that ZeRO or FSDP2 wrote")
    parser.add_argument("--out", type=Path, required=True, help="the .ckpt or .safetensors file to write")
    parser.add_argument("--monitor", required=True, help="the metric, as validation logs it")
    parser.add_argument(
        "--mode", choices=("auto", "min", "max"), default="auto", help="which is better (from its name)"
    )
    parser.add_argument("--ignore", nargs="+", default=[], help="hyper-parameters that may differ, such as `name`")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what is damaged or does not match")
    chosen, rest = parser.parse_known_args(arguments)
    mode = infer_mode(chosen.monitor) if chosen.mode == "auto" else chosen.mode
    if mode is None:
        raise MisconfigurationError(
            f"it cannot be told from its name whether `{chosen.monitor}` is better low or high: add --mode min or max."
        )
    built = BuiltCLI(["validate", *rest, "--trainer.logger=false"])
    done = greedy_soup(
        chosen.checkpoints,
        _scorer(built, chosen.monitor),
        chosen.out,
        mode=mode,
        skip_bad=chosen.skip_bad,
        ignore=chosen.ignore,
        module=built.model,
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    for path, reason in done.skipped.items():
        console.print(f"Left out `{path}`: {reason}")
    for path, reason in done.rejected.items():
        console.print(f"Left out `{path}` (itself {done.scores[path]:.4f}): {reason}.")
    best = done.scores[done.members[0]]
    console.print(
        f"Wrote `{done.path}`, the mean of {len(done.members)} of {len(done.scores)} checkpoints:"
        f" {chosen.monitor} {done.score:.4f}, best single {best:.4f}."
    )
    return 0


def _scorer(built: BuiltCLI, monitor: str) -> Any:
    def score(path: Path) -> float:
        # A copy each time: adapters are merged into the base that the module is built on, which must stay as it is.
        module = copy.deepcopy(built.model)
        built.trainer.validate(module, datamodule=built.datamodule, ckpt_path=str(path), verbose=False)
        found = built.trainer.callback_metrics
        if monitor not in found:
            logged = ", ".join(f"`{name}`" for name in sorted(found)) or "nothing"
            raise MisconfigurationError(f"validation does not log `{monitor}`. It logs {logged}: pass one of these.")
        return float(found[monitor])

    return score
