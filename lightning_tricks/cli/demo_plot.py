"""The demo's picture: loss, gradient norm with its limit, recall of each class by row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_tricks.cli.comparison import Result
from lightning_tricks.errors import MissingDependencyError

__all__ = ["plot"]

COLOURS = ("#8c8c8c", "#4477aa", "#228833", "#cc6677", "#aa8800")  # told apart without red-green vision, and in grey
WINDOW = 10  # steps that a point of the loss curve averages


def plot(path: Path, results: Sequence[Result], labels: Sequence[str]) -> None:
    """Draw the three panels into a PNG.

    Args:
        path: the file.
        results: of the rows that are finished.
        labels: the classes.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("The plot needs matplotlib. Run: pip install 'lightning-tricks[plot]'") from error
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    loss, norm, recall = figure.subplots(1, 3)
    _draw_loss(loss, results)
    _draw_norm(norm, results)
    _draw_recall(recall, results, labels)
    handles, names = recall.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=11)
    for axes in (loss, norm, recall):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_loss(axes: Any, results: Sequence[Result]) -> None:
    for result, colour in zip(results, COLOURS, strict=False):
        steps, values = _smooth(result.curves["train/loss"])
        axes.plot(steps, values, color=colour, linewidth=1.8)
    axes.set(title="Training loss", xlabel="optimizer step", ylabel=f"cross-entropy, mean of {WINDOW} steps", ylim=0)
    axes.grid(alpha=0.25)


def _draw_norm(axes: Any, results: Sequence[Result]) -> None:
    axes.set(title="Gradient norm before clipping", xlabel="optimizer step", ylabel="global 2-norm")
    axes.grid(alpha=0.25)
    clipped = [(each, colour, each.clip) for each, colour in zip(results, COLOURS, strict=False) if each.clip]
    if not clipped:
        axes.text(0.5, 0.5, "the row with clipping\nwas not finished", ha="center", transform=axes.transAxes)
        return
    highest = 0.0
    for place, (result, colour, limit) in enumerate(clipped):
        steps, norms = zip(*result.curves["grad_norm/total"], strict=True)
        share = sum(norm > limit for norm in norms) / len(norms)
        axes.plot(steps, norms, color=colour, linewidth=1.2)
        axes.axhline(limit, color="black", linestyle="--", linewidth=1.2)
        note = f"dashed: limit {limit:g}; {share:.0%} of the steps are clipped"
        axes.text(0.98, 0.97 - 0.055 * place, note, ha="right", va="top", color=colour, transform=axes.transAxes)
        highest = max(highest, limit, *norms)
    axes.set_ylim(0, highest * 1.24)


def _draw_recall(axes: Any, results: Sequence[Result], labels: Sequence[str]) -> None:
    width = 0.8 / len(results)
    for place, (result, colour) in enumerate(zip(results, COLOURS, strict=False)):
        left = [index - 0.4 + (place + 0.5) * width for index in range(len(labels))]
        values = [result.metrics[f"recall_{label}"] for label in labels]
        bars = axes.bar(left, values, width * 0.92, color=colour, label=result.name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set(title="Recall by class, test split", ylabel="recall", ylim=(0, 1.08))
    axes.set_xticks(range(len(labels)), labels)


def _smooth(curve: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Means of the last few values, so that one can see where it goes."""
    values = [value for _, value in curve]
    windows = [values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1)]
    return [step for step, _ in curve], [sum(window) / len(window) for window in windows]
