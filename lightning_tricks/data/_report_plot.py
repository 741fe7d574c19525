"""The picture of a loader's lengths and batches."""

from typing import TYPE_CHECKING, Any

from lightning_tricks.errors import MissingDependencyError

if TYPE_CHECKING:
    from lightning_tricks.data.reporting import DataReport

__all__ = ["plot_report"]


def plot_report(found: "DataReport", axes: Any = None) -> tuple[Any, Any]:
    """Draw the histogram of lengths, and batches by samples and padded length.

    Args:
        found: the report.
        axes: two axes to draw into; None: those of a new figure.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    left, right = _new_axes() if axes is None else axes
    left.hist(found.lengths, bins=60, color="#4477aa")
    left.set(xlabel="tokens of a sample", ylabel="samples", title=f"{len(found.lengths):,} samples")
    right.plot(found.counts.ravel(), found.widths.ravel(), ".", markersize=3, alpha=0.4, color="#cc6677")
    right.set(xlabel="samples of a batch", ylabel="padded length", title=f"{found.waste:.1%} padding")
    return left.figure, (left, right)


def _new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("The plot needs matplotlib. Run: pip install 'lightning-tricks[plot]'") from error
    return Figure(figsize=(9, 4), layout="constrained").subplots(1, 2)
