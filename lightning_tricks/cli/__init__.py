"""The `lightning-tricks` command."""

from lightning_tricks.cli.command import main

__all__ = ["main"]
