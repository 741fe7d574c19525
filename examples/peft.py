"""Ways to fine-tune an encoder with few parameters, each with the same budget on the review corpus.

    python examples/peft.py                               # about 25 minutes on one quiet thread
    python examples/peft.py --methods LoRA DoRA --seeds 0 # a slice; what is finished is kept, and not done again
    python examples/peft.py --quick                       # tries the script out, in seconds

Every fit gets the same texts in the same order, and as many steps. Learning rates are the best of those that `--tune`
tried on the validation texts with another seed, each three times the one before, and the lower one of two within 0.01;
DoRA and QLoRA have LoRA's, and the head that of the demo. Reported, over seeds: macro-F1 on test texts that no
fit has seen, trained parameters, CPU seconds of training, peak memory above the loaded model, and the bytes of a
checkpoint of what was trained. Prefixes are for decoders and fusions for several tasks: they are not here.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lightning_tricks.cli.demo_report import hardware
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.data.tokens import TokenDataset
from lightning_tricks.mixins import IA3, BitFit, Bottleneck, DoRA, LoRA, PromptTuning, trainable_report
from lightning_tricks.recipes import TextClassificationData, TextClassifier

ALL = ("query", "key", "value", "dense")
FEEDFORWARD = ("*[0-9].output.dense",)


class Way(NamedTuple):
    """One line of the table.

    Args:
        method: of the adapter; None for none.
        lr: the highest learning rate.
        base: how the targets' weights are kept.
        tuning: what else, as in `TextClassifier`.
    """

    method: Any
    lr: float
    base: Any = None
    tuning: str = "full"


WAYS = {
    "head alone": Way(None, 3e-2, tuning="head"),
    "everything": Way(None, 2e-4),
    "BitFit": Way(BitFit(), 6e-3),
    "IA3": Way(IA3(targets=("key", "value"), feedforward=FEEDFORWARD), 1e-2),
    "PromptTuning": Way(PromptTuning(tokens=10), 1e-2),
    "Bottleneck": Way(Bottleneck(width=16, targets=FEEDFORWARD), 3e-3),
    "LoRA q, v": Way(LoRA(rank=8, targets=("query", "value")), 3e-3),
    "LoRA": Way(LoRA(rank=8, targets=ALL), 2e-3),
    "rsLoRA": Way(LoRA(rank=32, targets=ALL, rslora=True), 7e-4),
    "LoRA+": Way(LoRA(rank=8, targets=ALL, plus=16), 2e-4),
    "PiSSA": Way(LoRA(rank=8, targets=ALL, init="pissa"), 7e-4),
    "DoRA": Way(DoRA(rank=8, targets=ALL), 2e-3),
    "QLoRA": Way(LoRA(rank=8, targets=ALL), 2e-3, base="nf4"),
}

DPI, WIDE, HIGH = 120, 100, 14  # of the picture; of a name in it, in pixels

QUESTION = "macro-F1 on unseen texts, trained parameters and cost of each way, with the same texts and steps"


class Budget(NamedTuple):
    """What every fit gets."""

    steps: int
    batch_size: int
    max_length: int
    scored: int
    limit: int | None = None


FULL = Budget(steps=150, batch_size=16, max_length=28, scored=1000)
QUICK = Budget(steps=2, batch_size=8, max_length=8, scored=30, limit=200)


class Tuned(TextClassifier):
    """A text classifier whose encoder is adapted by one of the ways."""

    def __init__(self, labels: list[str], *, class_counts: list[int], way: str, lr: float) -> None:
        chosen = WAYS[way]
        super().__init__(labels, class_counts=class_counts, tuning=chosen.tuning, lr=lr)
        if chosen.method is not None:
            self.adapt(self.encoder, chosen.method, base=chosen.base)

    def configure_optimizers(self):
        """As its own, with the learning rates of LoRA+."""
        found = super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.parameter_groups(self.lr, weight_decay=0.01))
        found["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {**found, "optimizer": optimizer}


def run(way, seed, budget, folder, *, lr=None, by="test"):
    """Fit once, and score on the test texts, or those of validation."""
    data = TextClassificationData(limit=budget.limit, max_length=budget.max_length, batch_size=budget.batch_size)
    data.setup("fit")
    L.seed_everything(seed, verbose=False)
    model = Tuned(data.labels, class_counts=data.class_counts, way=way, lr=lr or WAYS[way].lr)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=budget.steps, limit_val_batches=0, enable_model_summary=False, **quiet
    )
    before, start = peak(), time.process_time()
    trainer.fit(model, train_dataloaders=data.train_dataloader())
    seconds, after = time.process_time() - start, peak()
    trainer.save_checkpoint(folder / "model.ckpt", weights_only=True)
    size = (folder / "model.ckpt").stat().st_size
    (folder / "model.ckpt").unlink()
    loader = data.test_dataloader() if by == "test" else data.val_dataloader()
    [scores] = trainer.test(model, some(loader, budget.scored), verbose=False)
    return {
        "macro_f1": round(scores["test/macro_f1"], 4),
        "accuracy": round(scores["test/accuracy"], 4),
        "trained": trainable_report(model).trained,
        "cpu_seconds": round(seconds, 2),
        "peak_mib": round(after - before),
        "checkpoint_bytes": size,
    }


def peak():
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def some(loader, count):
    """Texts of a loader, evenly spaced, in larger batches."""
    whole = loader.dataset
    rows = whole.rows[np.linspace(0, len(whole.rows) - 1, min(count, len(whole.rows))).astype(int)]
    part = TokenDataset(whole.texts, rows, whole.labels)
    return TricksDataLoader(part, batch_size=50, shuffle=False, seed=0, collate_fn=loader.collate_fn)


def slices(options):
    """Run what is not there yet, each way in a process of its own, so that its peak memory is its own."""
    for way in options.methods:
        missing = [seed for seed in options.seeds if not place(options.output, way, seed).is_file()]
        if missing and options.quick:
            one(way, missing, QUICK, options.output)
        elif missing:
            command = [sys.executable, __file__, "--one", way, "--output", str(options.output)]
            subprocess.run([*command, "--seeds", *map(str, missing)], check=True)


def one(way, seeds, budget, folder):
    """The seeds of one way. Only the first one's peak tells what a fit needs; a later fit finds memory at hand."""
    for number, seed in enumerate(seeds):
        found = run(way, seed, budget, folder)
        if number:
            del found["peak_mib"]
        place(folder, way, seed).write_text(json.dumps(found) + "\n")
        print(f"{way}, seed {seed}: {found}", flush=True)


def place(folder, way, seed):
    """Where a finished fit is kept."""
    return folder / f"{way.replace(' ', '_').replace(',', '')}_{seed}.json"


def summary(options):
    """Of every way with all its seeds: mean, least and most of the score, and medians of the rest."""
    found = {}
    for way in WAYS:
        files = [place(options.output, way, seed) for seed in options.seeds]
        if not all(path.is_file() for path in files):
            continue
        each = [json.loads(path.read_text()) for path in files]
        scores = [result["macro_f1"] for result in each]
        found[way] = {
            "learning_rate": WAYS[way].lr,
            "macro_f1": {
                "mean": round(statistics.mean(scores), 4), "least": min(scores), "most": max(scores), "each": scores,
            },
            "trained": each[0]["trained"],
            "cpu_seconds": statistics.median(result["cpu_seconds"] for result in each),
            "peak_mib": max(result.get("peak_mib", 0) for result in each),
            "checkpoint_bytes": each[0]["checkpoint_bytes"],
        }  # fmt: skip
    return found


def table(found):
    """One line for each way."""
    shown = Table("way", "macro-F1", "least to most", "trained", "CPU s", "peak MiB", "file kB")
    for way, row in found.items():
        score = row["macro_f1"]
        spread = f"{score['least']:.3f} to {score['most']:.3f}"
        numbers = f"{row['trained']:,}", f"{row['cpu_seconds']:.1f}", str(row["peak_mib"])
        shown.add_row(way, f"{score['mean']:.3f}", spread, *numbers, f"{row['checkpoint_bytes'] / 1e3:,.0f}")
    return shown


def plot(found, path):
    """The score against trained parameters, and against CPU time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, quantity in ((left, "trained"), (right, "cpu_seconds")):
        for row in found.values():
            score, x = row["macro_f1"], row[quantity]
            spread = [[score["mean"] - score["least"]], [score["most"] - score["mean"]]]
            axes.errorbar(x, score["mean"], yerr=spread, fmt="o", capsize=2, lw=1)
        axes.margins(x=0.18)
        axes.grid(alpha=0.25)
    left.set(xscale="log", xlabel="trained parameters", ylabel="macro-F1, mean and range over seeds")
    right.set(xlabel="CPU seconds of training")
    figure.draw_without_rendering()  # decides where the points come to lie
    label(left, {way: (row["trained"], row["macro_f1"]["mean"]) for way, row in found.items()})
    label(right, {way: (row["cpu_seconds"], row["macro_f1"]["mean"]) for way, row in found.items()})
    figure.savefig(path)


def label(axes, points):
    """Name the points: at the right, or where another name stands there, below that."""
    taken = []
    for way, point in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = axes.transData.transform(point)
        lowest = y + 4
        for other_x, other_y in taken:  # from the highest down
            if abs(other_x - x) < WIDE and abs(other_y - lowest) < HIGH:
                lowest = other_y - HIGH
        taken.append((x, lowest))
        axes.annotate(way, point, (5, (lowest - y) * 72 / DPI), textcoords="offset points", fontsize=8)


def tune(ways, budget, folder):
    """Three learning rates for each way, on validation texts, with a seed that no reported fit has."""
    for way in ways:
        rates = [WAYS[way].lr * factor for factor in (1 / 3, 1, 3)]
        scores = {f"{lr:.1g}": run(way, 100, budget, folder, lr=lr, by="val")["macro_f1"] for lr in rates}
        print(way, scores, flush=True)


def main(arguments=None):
    """Run what is missing; print the table, draw the picture, write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(WAYS), choices=WAYS, metavar="NAME", help="all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="two steps on few texts: shows that it runs, no more")
    parser.add_argument("--tune", action="store_true", help="try learning rates instead")
    parser.add_argument("--output", type=Path, default=Path("runs/peft"), help="folder of what is finished (runs/peft)")
    parser.add_argument("--results", type=Path, help="the figures (peft.json in the folder)")
    parser.add_argument("--picture", type=Path, help="the plot (peft.png in the folder)")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # This file is called as a library that transformers looks for, and must not be found in its place.
    sys.path = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    budget = QUICK if options.quick else FULL
    options.output.mkdir(parents=True, exist_ok=True)
    if options.one:
        one(options.one, options.seeds, budget, options.output)
        return
    if options.tune:
        tune(options.methods, budget, options.output)
        return
    slices(options)
    found = summary(options)
    Console(width=100).print(table(found))
    plot(found, options.picture or options.output / "peft.png")
    head = {
        "question": QUESTION,
        "hardware": hardware(),
        "budget": budget._asdict(),
        "seeds": options.seeds,
        "threads": 1,
    }
    results = options.results or options.output / "peft.json"
    results.write_text(json.dumps({**head, "findings": found}, indent=1) + "\n")
    print(f"{results} has the figures.")


if __name__ == "__main__":
    main()
