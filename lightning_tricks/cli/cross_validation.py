"""`cross-validate`: one fit for each fold, and what they come to together."""

import hashlib
import json
import math
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_tricks.cli.checks import check_folder
from lightning_tricks.cli.named_files import fingerprint_of_files
from lightning_tricks.cli.training import TricksCLI
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.storage._atomic import atomic_file

__all__ = ["cross_validate", "spread"]

ASKED, RESULT = "asked.json", "result.json"


class ParsedCLI(TricksCLI):
    """Reads what a configuration says, and builds nothing."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


class FoldCLI(TricksCLI):
    """`fit` with everything below the fold's own folder; then the held-out fold is scored and the weights are kept."""

    def __init__(self, args: list[str], asked: str) -> None:
        self.asked = asked
        super().__init__(args, resume=True)

    def before_instantiate_classes(self) -> None:
        """Refuse what several processes would do several times."""
        super().before_instantiate_classes()
        trainer = self.config[self.subcommand].trainer
        if str(trainer.devices) not in ("auto", "1") or int(trainer.num_nodes) > 1:
            raise MisconfigurationError(
                f"`cross-validate` trains on one device, got `devices={trainer.devices}`: run `fit --data.fold=[0,5]`"
                " for each fold instead."
            )

    def before_fit(self) -> None:
        """Move the folders that callbacks name into the fold's, so that no fold meets another's checkpoints."""
        for callback in vars(self.trainer)["callbacks"]:
            if getattr(callback, "dirpath", None):
                callback.dirpath = _below(self.trainer.default_root_dir, callback.dirpath)
        super().before_fit()
        _write(Path(self.trainer.default_root_dir) / ASKED, {"asked": self.asked})

    def after_fit(self) -> None:
        """Score the weights that the fit ended with, on the whole fold, and keep them."""
        folder = Path(self.trainer.default_root_dir)
        self.trainer.save_checkpoint(folder / "model.ckpt", weights_only=True)
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        self.scores = {name: float(value) for name, value in self.trainer.callback_metrics.items()}


def cross_validate(arguments: list[str]) -> int:
    """Fit on all folds but one, validate on that one, and so on for each; print and write a table.

    A fold that is finished is not run again, and one that was interrupted goes on from its newest checkpoint; with
    other options, another configuration, or other content in the files that model and data name, neither.

    Args:
        arguments: `--folds`, `--out`, and LightningCLI's options for `fit`: `--config`.

    Raises:
        MisconfigurationError: for an option out of range, data without the option `fold`, or an `--out` that holds
            folds of other options or data.
    """
    parser = ArgumentParser(
        "lightning-tricks cross-validate",
        description="One fit for each fold. Further options, such as --config, are those of `lightning-tricks fit`."
        " The data need an option `fold`, as TextClassificationData has: which fold to hold out, and their number.",
    )
    parser.add_argument("--folds", type=int, default=5, help="how many, 2 or more (5)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/cross_validation"), help="folder (runs/cross_validation)"
    )
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.folds < 2:
        raise MisconfigurationError(f"`--folds` must be 2 or more, got {chosen.folds}: 5 is usual.")
    check_folder(chosen.out)
    asked = _fingerprint(chosen.folds, rest)
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    results = [_fold(chosen, rest, asked, number, console) for number in range(chosen.folds)]
    Console(file=sys.stdout, highlight=False).print(_table(results))
    summary = {"folds": results, "metrics": {name: spread([one[name] for one in results]) for name in results[0]}}
    _write(chosen.out / "cross_validation.json", summary)
    console.print(f"Written to `{chosen.out}/cross_validation.json`; each fold's weights are its `model.ckpt`.")
    return 0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation, least and most.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'mean': 2.0, 'std': 1.0, 'least': 1.0, 'most': 3.0}
    """
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return {"mean": statistics.fmean(values), "std": deviation, "least": min(values), "most": max(values)}


def _fold(chosen: Any, rest: list[str], asked: str, number: int, console: Console) -> dict[str, float]:
    folder = chosen.out / f"fold_{number}"
    kept = _finished(folder / RESULT, asked)
    if kept is not None:
        console.print(f"Fold {number + 1} of {chosen.folds} is finished already.")
        return kept
    console.print(f"Fold {number + 1} of {chosen.folds}:")
    own = [f"--data.fold=[{number},{chosen.folds}]", f"--trainer.default_root_dir={folder}"]
    scores = FoldCLI(["fit", *rest, *own], asked).scores
    _write(folder / RESULT, {"asked": asked, "scores": scores})
    return scores


def _finished(path: Path, asked: str) -> dict[str, float] | None:
    """The scores of a fold that was run before with the same options."""
    for found in (path.with_name(ASKED), path):
        if found.exists() and json.loads(found.read_text())["asked"] != asked:
            raise MisconfigurationError(
                f"`{path.parent}` holds a fold of other options, another configuration or other data: give another"
                " --out, or remove it."
            )
    return json.loads(path.read_text())["scores"] if path.exists() else None


def _fingerprint(folds: int, rest: Sequence[str]) -> str:
    """Of the options, of the configurations that they name, and of the files that those name for model and data."""
    digest = hashlib.sha256(repr((folds, list(rest))).encode())
    for argument in rest:
        path = Path(argument.partition("=")[2] or argument)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            digest.update(path.read_bytes())
    said = ParsedCLI(["fit", *rest]).config["fit"].as_dict()
    digest.update(fingerprint_of_files(said["model"], said["data"]).encode())
    return digest.hexdigest()


def _below(folder: str | Path, given: str | Path) -> str:
    given = Path(given)
    inside = given.is_relative_to(folder) or given.absolute().is_relative_to(Path(folder).absolute())
    return str(given if inside else Path(folder) / given.name)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def _table(results: Sequence[Mapping[str, float]]) -> Table:
    """A row for each metric: the folds, their mean and their sample standard deviation."""
    table = Table("", *(f"fold {number}" for number in range(1, len(results) + 1)), "mean ± std")
    for name in results[0]:
        values = [result[name] for result in results]
        found = spread(values)
        table.add_row(name, *(f"{value:.4f}" for value in values), f"[bold]{found['mean']:.4f} ± {found['std']:.4f}[/]")
    return table
