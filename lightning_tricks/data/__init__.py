"""Loaders that resume exactly and read the user's files."""

from lightning_tricks.data.loader import TricksDataLoader

__all__ = ["TricksDataLoader"]
