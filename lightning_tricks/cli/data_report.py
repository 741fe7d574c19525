"""`data-report`: what the training batches of these options would hold."""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_tricks.cli.training import TricksCLI
from lightning_tricks.data import DataReport, report
from lightning_tricks.errors import MisconfigurationError

__all__ = ["data_report"]


def data_report(arguments: list[str]) -> int:
    """Print how much of the training batches is padding, and how evenly ranks share them. Nothing is trained.

    Args:
        arguments: the options of `fit`; `--ranks N`, `--plot FILE` and `--length KEY` before or among them.

    Raises:
        MisconfigurationError: for what `fit` itself would not understand.
    """
    parser = ArgumentParser("lightning-tricks data-report", description="What training batches hold.", add_help=False)
    parser.add_argument("--ranks", type=int, default=1, help="how many devices to report for")
    parser.add_argument("--plot", type=Path, help="a picture of lengths and batches")
    parser.add_argument("--length", default="input_ids", help="the key of a sample's sequence")
    own, rest = parser.parse_known_args(arguments)
    if "--help" in rest or "-h" in rest:
        parser.print_help()
        return 0
    if own.ranks < 1:
        raise MisconfigurationError(f"`--ranks` must be at least 1, got {own.ranks}.")
    try:
        loader = _ReportCLI(["fit", *rest]).loader
    except MisconfigurationException as error:  # Lightning's own
        raise MisconfigurationError(str(error)) from error
    found = report(loader, ranks=own.ranks, length=own.length)
    _print(found)
    if own.plot is not None:
        own.plot.parent.mkdir(parents=True, exist_ok=True)
        found.plot()[0].savefig(own.plot, dpi=120)
    return 0


class _ReportCLI(TricksCLI):
    loader: Any

    def before_instantiate_classes(self) -> None:
        """Write nothing: no run's folder is needed."""

    def _run_subcommand(self, subcommand: str) -> Any:
        data = self.datamodule
        data.prepare_data()
        data.setup("fit")
        self.loader = data.train_dataloader()


def _print(found: DataReport) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, text in found.rows():
        table.add_row(name, escape(text))
    Console(file=sys.stdout, highlight=False).print(table)
