"""`list` and `show`: what the suite has, and one of it in full."""

import sys
from argparse import ArgumentParser

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from lightning_tricks.cli.catalogue import Entry, entries
from lightning_tricks.cli.names import nearest
from lightning_tricks.errors import MisconfigurationError

__all__ = ["list_tricks", "show"]

TITLES = {"callback": "Callbacks", "strategy": "Strategy flags", "mixin": "Mixins"}


def list_tricks(arguments: list[str]) -> int:
    """Print every trick and strategy flag, one line each.

    Args:
        arguments: none but `--help`.

    Example:
        >>> list_tricks([])  # doctest: +ELLIPSIS
        Callbacks...
        0
    """
    ArgumentParser("lightning-tricks list", description="The tricks and the strategy flags.").parse_args(arguments)
    found = entries().values()
    console = Console(file=sys.stdout, highlight=False)
    for kind, title in TITLES.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(no_wrap=True, style="cyan", min_width=max(len(entry.name) for entry in found))
        table.add_column()
        for entry in found:
            if entry.kind == kind:
                table.add_row(entry.name, entry.summary)
        console.print(table)
    console.print("`lightning-tricks show NAME` prints one in full.")
    return 0


def show(arguments: list[str]) -> int:
    """Print a file to stack for a callback or a strategy flag; for a mixin, the code to start from.

    Args:
        arguments: the name, as `list` gives it; upper and lower case are the same.

    Raises:
        MisconfigurationError: if there is no such trick; the nearest names are given.

    Example:
        >>> show(["zero_2"])  # doctest: +ELLIPSIS
        # ...
        trainer:
          strategy: zero_2
        0
    """
    parser = ArgumentParser("lightning-tricks show", description="One trick in full, ready to stack or to copy.")
    parser.add_argument("name", help="a name that `lightning-tricks list` prints")
    _print(_find(parser.parse_args(arguments).name))
    return 0


def _find(name: str) -> Entry:
    found = entries()
    for entry in found.values():
        if name.lower() == entry.name.lower():
            return entry
    raise MisconfigurationError(f"`{name}` is not a trick or a strategy flag. {nearest(name, found)}")


def _print(entry: Entry) -> None:
    if not sys.stdout.isatty():  # into a file, exactly what the catalogue holds
        sys.stdout.write(entry.text)
        return
    language = "python" if entry.kind == "mixin" else "yaml"
    Console().print(Syntax(entry.text, language, background_color="default", word_wrap=True))
