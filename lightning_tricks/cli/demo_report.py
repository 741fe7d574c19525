"""The demo's table and its `report.json`."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import lightning_tricks
from lightning_tricks.cli.comparison import Budget, Result

__all__ = ["hardware", "table", "write_json"]


def table(results: list[Result], rarest: str) -> Table:
    """What each row came to on the test split, the best value of each score in bold; and what it took to train.

    Args:
        results: of the rows that are finished.
        rarest: the label of the class with the fewest training texts.
    """
    # Eighty columns wide, with what the rows are called and all of their figures.
    found = Table(title="Held-out test split", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    found.add_column("", no_wrap=True)
    scores = {"accuracy": "accu-\nracy", "macro_f1": "macro-\nF1", f"recall_{rarest}": f"recall\n“{rarest}”"}
    for heading in (*scores.values(), "sec-\nonds", "texts\n/ sec.", "train-\nable", "check-\npoint kB"):
        found.add_column(heading, justify="right")
    best = {name: max(result.metrics[name] for result in results) for name in scores}
    for result in results:
        cells = [_score(result.metrics[name], best[name]) for name in scores]
        size = f"{result.checkpoint_bytes / 1e3:,.0f}"
        speed = f"{result.texts_per_second:.0f}"
        found.add_row(result.name, *cells, f"{result.seconds:.0f}", speed, f"{result.trainable:,}", size)
    return found


def write_json(path: Path, results: list[Result], budget: Budget, *, seed: int, interrupted: bool) -> None:
    """Write all figures, with the budget and the machine they were measured on.

    Args:
        path: the file.
        results: of the rows that are finished.
        budget: what every row got.
        seed: of the run.
        interrupted: whether rows are missing.
    """
    content = {
        "seed": seed,
        "interrupted": interrupted,
        "budget": asdict(budget),
        "hardware": hardware(),
        "rows": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def hardware() -> dict[str, Any]:
    """The machine and the versions that figures depend on.

    Example:
        >>> sorted(hardware())
        ['cores', 'gpu', 'lightning', 'lightning_tricks', 'processor', 'python', 'threads', 'torch']
    """
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "lightning_tricks": lightning_tricks.__version__,
    }


def _score(value: float, best: float) -> str:
    return f"[bold]{value:.3f}[/]" if value == best else f"{value:.3f}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
