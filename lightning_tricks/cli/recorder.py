"""A logger that keeps what is logged in memory."""

from typing import Any

from lightning.pytorch.loggers import Logger

__all__ = ["Recorder"]


class Recorder(Logger):
    """Keeps every logged value with its optimizer step.

    Attributes:
        curves: for each metric its `(step, value)` pairs, in the order they were logged.

    Example:
        >>> recorder = Recorder()
        >>> recorder.log_metrics({"train/loss": 0.5, "epoch": 0}, step=3)
        >>> recorder.curves
        {'train/loss': [(3, 0.5)]}
    """

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, list[tuple[int, float]]] = {}

    @property
    def name(self) -> str:
        """The logger's name."""
        return "recorder"

    @property
    def version(self) -> int:
        """Always 0: one logger serves one run."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep values.

        Args:
            metrics: value by name.
            step: the optimizer step they belong to.
        """
        for name, value in metrics.items():
            if name != "epoch":
                self.curves.setdefault(name, []).append((step or 0, float(value)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters are in the checkpoints already."""
