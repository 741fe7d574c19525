"""What the demo shows while it trains: one bar per row."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["RowProgress", "progress_display"]


def progress_display(console: Console) -> Progress:
    """A display with a line per row: name, bar, steps, time, and what is going on.

    Args:
        console: where to show it.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
    )


class RowProgress(Callback):
    """Moves one line of the display along with a Trainer.

    Args:
        display: from `progress_display`.
        task: its line.
    """

    def __init__(self, display: Progress, task: TaskID) -> None:
        self.display = display
        self.task = task

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.display.reset(self.task, state="training")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *rest: Any) -> None:
        """Show the step and its loss."""
        loss = trainer.callback_metrics.get("train/loss")
        state = "training" if loss is None else f"loss {float(loss):.2f}"
        self.display.update(self.task, completed=trainer.global_step, state=state)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that validation runs."""
        self.display.update(self.task, state="validating")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the test split is scored."""
        self.display.update(self.task, state="testing")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result and stop the clock."""
        score = float(trainer.callback_metrics["test/macro_f1"])
        self.display.update(self.task, state=f"macro-F1 {score:.3f}")
        self.display.stop_task(self.task)
