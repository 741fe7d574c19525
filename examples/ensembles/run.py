"""Three ensembles of a text classifier, each combined in four ways: which of them is worth its cost?

    python examples/ensembles/run.py            # under 20 minutes on two quiet cores
    python examples/ensembles/run.py --quick    # tries the script out, in seconds

The ensembles: the same model from K initialisations; the models of a K-fold cross-validation, best first; the last K
epochs of one run. The ways: the best single member, the average of the weights, the greedy soup, the prediction
ensemble. What is chosen is chosen on one half of the held-out texts, and reported on the other half.
"""

import argparse
import json
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import lightning as L
from lightning.pytorch import Trainer
from members import FULL, QUICK, folds, held_out, initialisations, one_run
from rich.console import Console
from rich.table import Table

from lightning_tricks.inference import PredictionEnsemble, average_checkpoints, greedy_soup
from lightning_tricks.recipes import TextClassifier

ENSEMBLES = {"initialisations": initialisations, "cross-validation": folds, "one run": one_run}
METRICS = ("accuracy", "macro_f1", "calibration_error", "loss")


class Study:
    """Combines and scores the members of one ensemble."""

    def __init__(self, paths, folder, choose_by, report_on):
        self.paths, self.folder, self.choose_by, self.report_on = paths, folder, choose_by, report_on
        self.trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        # Adapters are merged into the encoder that they were trained beside.
        self.base = TextClassifier(["fresh", "plot", "rotten"], class_weighting="none")

    def score(self, members, loader):
        """Accuracy, macro-F1, calibration error and loss of the members' mean probabilities."""
        ensemble = PredictionEnsemble(members, TextClassifier, ignore=())
        [found] = self.trainer.test(ensemble, loader, verbose=False)
        return {name: found[f"test/{name}"] for name in METRICS}

    def average(self, members, name):
        """The mean of the members' weights."""
        return average_checkpoints(members, self.folder / f"{name}.ckpt", module=self.base).path

    def ways(self):
        """The four ways, and the curves over the number of members, best first."""
        chosen_by = {path: self.score([path], self.choose_by)["accuracy"] for path in self.paths}
        ranked = sorted(self.paths, key=lambda path: -chosen_by[path])
        soup = greedy_soup(
            ranked,
            lambda path: self.score([path], self.choose_by)["accuracy"],
            self.folder / "soup.ckpt",
            module=self.base,
        )
        counts = range(1, len(ranked) + 1)
        averages = [self.average(ranked[:count], f"average_{count}") for count in counts]
        curves = {
            "weight average": [self.score([path], self.report_on) for path in averages],
            "prediction ensemble": [self.score(ranked[:count], self.report_on) for count in counts],
        }
        rows = {
            "best single": curves["prediction ensemble"][0],
            "weight average": curves["weight average"][-1],
            "greedy soup": self.score([soup.path], self.report_on),
            "prediction ensemble": curves["prediction ensemble"][-1],
        }
        return rows, {name: [point["accuracy"] for point in curve] for name, curve in curves.items()}, len(soup.members)


def study(budget, output):
    """Every ensemble's rows, curves and costs."""
    choose_by, report_on = held_out(budget)
    found = {}
    for name, train in ENSEMBLES.items():
        folder = output / name.replace(" ", "_")
        paths, seconds = train(budget, folder)
        started = time.perf_counter()
        rows, curves, in_soup = Study(paths, folder, choose_by, report_on).ways()
        found[name] = {
            "rows": rows,
            "accuracy_by_members": curves,
            "members_in_the_soup": in_soup,
            "training_seconds": round(seconds, 1),
            "scoring_seconds": round(time.perf_counter() - started, 1),
            "forward_passes": {way: len(paths) if way == "prediction ensemble" else 1 for way in rows},
        }
        print(f"{name}: {seconds:.0f} s of training", flush=True)
    return found, len(report_on.dataset)


def table(found):
    """One line for each ensemble and way."""
    shown = Table("ensemble", "way", "accuracy", "macro-F1", "calibration error", "training s", "forward passes")
    for name, result in found.items():
        for way, scores in result["rows"].items():
            cells = [f"{scores[metric]:.4f}" for metric in METRICS[:3]]
            passes = str(result["forward_passes"][way])
            shown.add_row(name, way, *cells, f"{result['training_seconds']:.0f}", passes)
    return shown


def plot(found, path):
    """Accuracy against the number of members."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for (way, curve), style in zip(result["accuracy_by_members"].items(), ("o--", "s-"), strict=True):
            axes.plot(range(1, len(curve) + 1), curve, style, label=way)
        axes.set(title=name, xlabel="members, best first", xticks=range(1, len(curve) + 1))
        axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.axes[0].set_ylabel("accuracy")
    figure.savefig(path, dpi=130)


def main():
    """Train, combine, score; print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few texts and members: shows that it runs, no more")
    parser.add_argument("--output", type=Path, default=Path("runs/ensembles"), help="folder (runs/ensembles)")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    L.seed_everything(0, verbose=False)
    budget, started = QUICK if options.quick else FULL, time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    found, reported = study(budget, options.output)
    Console(width=110).print(table(found))
    plot(found, options.output / "ensembles.png")
    seconds = round(time.perf_counter() - started)
    result = {"budget": asdict(budget), "texts_reported_on": reported, "seconds": seconds, "ensembles": found}
    (options.output / "ensembles.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{seconds} s in all; {options.output}/ensembles.json has all figures, ensembles.png the curves.")


if __name__ == "__main__":
    main()
