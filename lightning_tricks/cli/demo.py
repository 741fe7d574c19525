"""`demo`: fine-tune a real transformer five ways on the same texts and budget, and compare."""

import logging
import time
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from lightning_tricks.cli.checks import check_folder
from lightning_tricks.cli.comparison import FULL, QUICK, ROWS, Budget, Result, train
from lightning_tricks.cli.demo_plot import plot
from lightning_tricks.cli.demo_progress import RowProgress, progress_display
from lightning_tricks.cli.demo_report import table, write_json
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.recipes import TextClassificationData

__all__ = ["demo"]

INTERRUPTED = 130


def demo(arguments: list[str]) -> int:
    """Train the rows, print the table, write `report.png` and `report.json`.

    Args:
        arguments: `--quick`, `--seed N`, `--output FOLDER`.

    Returns:
        0, or 130 after Ctrl-C; what was finished is reported all the same.
    """
    options = _parser().parse_args(arguments)
    if options.seed < 0:
        raise MisconfigurationError(f"`--seed` must be 0 or more, got {options.seed}.")
    check_folder(options.output)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console, budget, start = Console(highlight=False), QUICK if options.quick else FULL, time.perf_counter()
    console.print(f"Fine-tuning a transformer on film reviews {len(ROWS)} ways, {budget.steps} steps each.")
    data = [budget.data(options.seed, by_tokens=by_tokens) for by_tokens in (False, True)]
    results = _run(budget, data, options, console)
    if results:
        _report(results, budget, data[0], options, console)
    console.print(f"{time.perf_counter() - start:.0f} seconds in all.")
    return 0 if len(results) == len(ROWS) else INTERRUPTED


def _parser() -> ArgumentParser:
    parser = ArgumentParser("lightning-tricks demo", description="Fine-tune a real transformer five ways and compare.")
    parser.add_argument("--quick", action="store_true", help="fewer texts and steps: under a minute")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order and the first weights (0)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder (runs/demo)")
    return parser


def _run(budget: Budget, data: list[TextClassificationData], options: Namespace, console: Console) -> list[Result]:
    results: list[Result] = []
    try:
        data[0].prepare_data()  # shows its own progress, the first time
        with warnings.catch_warnings(), progress_display(console) as display:
            warnings.simplefilter("ignore")  # Lightning's advice would tear the progress display apart
            tasks = [display.add_task(row.name, start=False, total=budget.steps, state="waiting") for row in ROWS]
            for number, (row, task) in enumerate(zip(ROWS, tasks, strict=True), 1):
                folder, watch = options.output / f"row_{number}", RowProgress(display, task)
                own = data[row.by_tokens]
                results.append(train(row, budget, own, seed=options.seed, folder=folder, watch=watch))
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C during a fit into SystemExit
        console.print("Interrupted: this is what was finished.")
    return results


def _report(
    results: list[Result], budget: Budget, data: TextClassificationData, options: Namespace, console: Console
) -> None:
    counts = data.class_counts
    console.print(table(results, rarest=data.labels[counts.index(min(counts))]))
    interrupted = len(results) < len(ROWS)
    write_json(options.output / "report.json", results, budget, seed=options.seed, interrupted=interrupted)
    plot(options.output / "report.png", results, data.labels)
    console.print(f"{options.output}/report.png shows loss, gradient norm and recall; report.json has all figures.")
