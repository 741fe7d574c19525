"""Loaders that resume exactly and read the user's files."""

from lightning_tricks.data.class_balance import ClassBalancedSampler
from lightning_tricks.data.length_buckets import LengthBucketSampler
from lightning_tricks.data.lengths import measure_lengths
from lightning_tricks.data.loader import TricksDataLoader

__all__ = ["ClassBalancedSampler", "LengthBucketSampler", "TricksDataLoader", "measure_lengths"]
