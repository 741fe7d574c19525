"""The picture of a watched metric: its values, what was judged, the best and the stop."""

from typing import Any

from lightning_tricks.callbacks._norm_plot import new_axes
from lightning_tricks.callbacks._watch import Tracker

__all__ = ["plot_stopping"]


def plot_stopping(tracker: Tracker, stopped_step: int | None, ax: Any = None) -> tuple[Any, Any]:
    """Draw a metric over optimizer steps.

    Args:
        tracker: what was measured.
        stopped_step: the step that the fit was stopped at; None if it was not.
        ax: axes to draw into; None: those of a new figure.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    ax = new_axes() if ax is None else ax
    steps, values, judged = zip(*tracker.points, strict=True) if tracker.points else ((), (), ())
    ax.plot(steps, values, ".-", linewidth=0.8, color="#4477aa", label=tracker.watch.monitor)
    if tracker.watch.smoothing:
        ax.plot(steps, judged, color="#aa3377", linewidth=1.4, label="smoothed")
    if tracker.best is not None:
        ax.plot([tracker.best_step], [tracker.best], "*", markersize=12, color="#228833", label="best")
    if stopped_step is not None:
        ax.axvline(stopped_step, color="#cc6677", linewidth=1.0, linestyle="--", label="stopped")
    ax.set(xlabel="optimizer step", ylabel=tracker.watch.monitor)
    ax.legend(frameon=False)
    return ax.figure, ax
