"""`check`: what would become of each trick in a fit with these options."""

import sys
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_tricks.cli.checks import check_devices, check_strategy
from lightning_tricks.cli.training import TricksCLI
from lightning_tricks.engines import Report, check
from lightning_tricks.errors import MisconfigurationError

__all__ = ["check_fit"]

COLOURS = {"exact": "green", "degraded": "yellow", "refused": "red"}
REFUSED = 1


def check_fit(arguments: list[str]) -> int:
    """Build the Trainer, the module and the data as `fit` would, and print the report. Nothing is trained or written.

    Args:
        arguments: the options of `fit`.

    Returns:
        0, or 1 if something is refused.

    Raises:
        MisconfigurationError: for what `fit` itself would not understand.
    """
    try:
        report = _CheckCLI(["fit", *(argument for argument in arguments if argument != "--resume")]).report
    except MisconfigurationException as error:  # Lightning's own
        raise MisconfigurationError(str(error)) from error
    _print(report)
    return REFUSED if report.verdict == "refused" else 0


class _CheckCLI(TricksCLI):
    report: Report

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        check_strategy(trainer.strategy)
        check_devices(trainer.accelerator, trainer.devices)

    def _run_subcommand(self, subcommand: str) -> Any:
        self.report = check(self.trainer, self.model, self.datamodule)


def _print(report: Report) -> None:
    console = Console(file=sys.stdout, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trick", style="cyan", overflow="fold")
    for name in ("engine", "verdict"):
        table.add_column(name, no_wrap=True)
    table.add_column("why, and what to do", overflow="fold")
    for found in report:
        colour = COLOURS[found.verdict]
        table.add_row(escape(found.trick), found.engine, f"[{colour}]{found.verdict}[/]", escape(found.why))
    console.print(table)
    console.print(_summary(report))


def _summary(report: Report) -> str:
    """What a fit would do.

    Example:
        >>> _summary(Report([]))
        'A fit would begin: all is as on one device.'
    """
    if refused := report.of("refused"):
        return f"A fit would be refused: {len(refused)} of {len(report)} lines above."
    if degraded := report.of("degraded"):
        return f"A fit would begin, with {len(degraded)} of {len(report)} lines above not as on one device."
    return "A fit would begin: all is as on one device."
