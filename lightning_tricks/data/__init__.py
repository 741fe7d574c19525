"""Loaders that resume exactly and read the user's files."""

from lightning_tricks.data.class_counts import count_classes
from lightning_tricks.data.loader import TricksDataLoader

__all__ = ["TricksDataLoader", "count_classes"]
