"""The picture of gradient norms over steps."""

from typing import Any

from lightning_tricks.callbacks._norm_series import NormSeries
from lightning_tricks.errors import MissingDependencyError

__all__ = ["new_axes", "plot_norms"]


def plot_norms(series: NormSeries, ax: Any = None) -> tuple[Any, Any]:
    """Draw norms, their usual range, the limit of clipping and skipped steps.

    Args:
        series: what was measured.
        ax: axes to draw into; None: those of a new figure.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    series.settle()
    ax = new_axes() if ax is None else ax
    steps, norms, limits = zip(*series.points, strict=True) if series.points else ((), (), ())
    ax.plot(steps, norms, ".", markersize=3, color="#4477aa", label="norm")
    if series.sketch.count:
        low, high = series.sketch.quantiles([0.05, 0.95]).tolist()
        ax.axhspan(low, high, color="#4477aa", alpha=0.15, label="5th to 95th percentile")
    if any(limit == limit for limit in limits):
        ax.plot(steps, limits, color="#cc6677", linewidth=1.2, label="limit")
    for index, step in enumerate(series.skipped):
        ax.axvline(step, color="#228833", linewidth=0.8, linestyle=":", label="" if index else "skipped")
    if norms and min(norms) > 0:
        ax.set_yscale("log")
    ax.set(xlabel="optimizer step", ylabel="gradient norm")
    ax.legend(frameon=False)
    return ax.figure, ax


def new_axes() -> Any:
    """Those of a new figure.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("The plot needs matplotlib. Run: pip install 'lightning-tricks[plot]'") from error
    return Figure(figsize=(8, 4.5), layout="constrained").subplots()
