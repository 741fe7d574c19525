"""`predict`: labels and probabilities of texts, from the checkpoint of any engine."""

import csv
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_tricks.cli.checks import check_folder
from lightning_tricks.data.files import read_columns, refuse_nulls
from lightning_tricks.data.padding import PadToLongest
from lightning_tricks.data.tokens import load_tokenizer
from lightning_tricks.engines import read_checkpoint
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.recipes import TextClassifier
from lightning_tricks.recipes._encoders import encoder_source

__all__ = ["build_classifier", "load_classifier", "predict", "probabilities"]

SHOWN = 50  # rows of the table on the terminal


def predict(arguments: list[str]) -> int:
    """Print or write labels and probabilities; without `--checkpoint`, LightningCLI's `predict`.

    Args:
        arguments: `--checkpoint PATH` with `--text` (as often as wanted) or `--data.path`, and `--output`.

    Raises:
        CheckpointError: if the checkpoint is not there, incomplete, or not of a text classifier.
        DataError: if the file has no such column, or blank cells.
    """
    names = {argument.partition("=")[0] for argument in arguments}
    if "--checkpoint" in names or names & {"-h", "--help"}:
        return _predict(_parser().parse_args(arguments))
    if names & {"--text", "--output"}:
        raise MisconfigurationError("`predict` needs the model as well: add `--checkpoint PATH`.")
    from lightning_tricks.cli.training import run

    return run("predict", arguments)


def load_classifier(path: str | Path) -> TextClassifier:
    """The trained classifier of a checkpoint, ready to predict.

    Args:
        path: a file, or the folder that a sharded strategy writes.

    Raises:
        CheckpointError: if it is not there, incomplete, or of another kind of model.
    """
    checkpoint = read_checkpoint(Path(path))
    model = build_classifier(checkpoint, path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval()


def build_classifier(checkpoint: Mapping[str, Any], path: str | Path) -> TextClassifier:
    """A new classifier with the hyper-parameters of a checkpoint, on the base that it was trained on.

    Args:
        checkpoint: what it holds.
        path: its path, for messages.

    Raises:
        CheckpointError: if it is of another kind of model.
    """
    options = {name: value for name, value in checkpoint.get("hyper_parameters", {}).items() if name != "_instantiator"}
    package, name = options.pop("_class_path", "lightning_tricks.recipes.TextClassifier").rsplit(".", 1)
    kind = getattr(import_module(package), name)
    if not issubclass(kind, TextClassifier) or "labels" not in options:
        raise CheckpointError(
            f"`{path}` is not the checkpoint of a TextClassifier, so its labels are unknown. For a module of your own "
            "use `lightning-tricks predict --config CONFIG --ckpt_path PATH`."
        )
    model: TextClassifier = kind(**options)
    return model


def probabilities(model: TextClassifier, texts: Sequence[str], *, max_length: int, batch_size: int = 32) -> Tensor:
    """The probability of each label for each text, (texts, labels), fp32.

    Args:
        model: a classifier, as `load_classifier` gives it.
        texts: in any order; those of similar length are computed together.
        max_length: the most tokens of a text: what the model was trained with.
        batch_size: texts at a time, 1 or more.
    """
    tokenizer = load_tokenizer(encoder_source(str(model.hparams["name"])))
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    pad = PadToLongest(tokenizer.pad_token_id)
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    found = torch.empty(len(texts), len(model.labels))
    starts = range(0, len(order), batch_size)
    with torch.inference_mode():
        for start in track(starts, "Predicting", console=Console(stderr=True), disable=len(starts) < 2):
            rows = order[start : start + batch_size]
            found[rows] = model.predict_step(pad([{"input_ids": tokens[row]} for row in rows]), 0)
    return found


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "lightning-tricks predict",
        description="Labels and probabilities of texts. Without --checkpoint this is LightningCLI's `predict`, "
        "with --config and --ckpt_path.",
    )
    parser.add_argument("--checkpoint", required=True, help="file or folder that `fit` wrote, of any strategy")
    parser.add_argument("--text", action="append", default=[], help="a text; may be repeated")
    parser.add_argument("--data.path", dest="path", help="CSV, TSV, Parquet or JSONL, plain, .bz2 or .gz")
    parser.add_argument("--data.text", dest="column", default="text", help="its column of texts (text)")
    parser.add_argument("--data.max_length", dest="max_length", type=int, default=128, help="tokens kept (128)")
    parser.add_argument("--data.batch_size", dest="batch_size", type=int, default=32, help="texts at a time (32)")
    parser.add_argument("--output", type=Path, help="CSV to write instead of printing a table")
    return parser


def _predict(options: Namespace) -> int:
    if options.output:
        check_folder(options.output.parent)
    texts = _texts(options)
    model = load_classifier(options.checkpoint)
    found = probabilities(model, texts, max_length=options.max_length, batch_size=options.batch_size)
    if options.output:
        _write(options.output, model.labels, texts, found)
    else:
        _show(model.labels, texts, found)
    return 0


def _texts(options: Namespace) -> list[str]:
    if options.path and options.text:
        raise MisconfigurationError("`--text` and `--data.path` both give texts: use one of them.")
    if options.path:
        texts = read_columns(options.path, [options.column])[options.column]
        refuse_nulls(texts, options.column, options.path)
        return [str(text) for text in texts]
    if not options.text:
        raise MisconfigurationError("There is nothing to predict: add `--text '...'` or `--data.path FILE`.")
    return list(options.text)


def _write(path: Path, labels: Sequence[str], texts: Sequence[str], found: Tensor) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label", *(f"probability_{label}" for label in labels)])
        for text, row in zip(texts, found.tolist(), strict=True):
            rows.writerow([text, labels[row.index(max(row))], *(f"{value:.6f}" for value in row)])
    sys.stdout.write(f"{len(texts)} predictions written to {path}\n")


def _show(labels: Sequence[str], texts: Sequence[str], found: Tensor) -> None:
    table = Table("text", "label", *labels)
    for text, row in zip(texts[:SHOWN], found[:SHOWN].tolist(), strict=True):
        best = row.index(max(row))
        cells = [f"[bold]{value:.3f}[/]" if i == best else f"{value:.3f}" for i, value in enumerate(row)]
        table.add_row(_short(text), labels[best], *cells)
    console = Console(file=sys.stdout)
    console.print(table)
    if len(texts) > SHOWN:
        console.print(f"and {len(texts) - SHOWN} more: `--output FILE.csv` writes them all.")


def _short(text: str, width: int = 80) -> str:
    text = " ".join(text.split()).replace("[", r"\[")
    return text if len(text) <= width else text[: width - 1] + "…"
