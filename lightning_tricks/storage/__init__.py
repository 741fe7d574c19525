"""Weights on disk: streamed, atomic, safe to load."""

from lightning_tricks.storage.averaging import average_weights
from lightning_tricks.storage.weights_file import WeightsFile, write_weights

__all__ = ["WeightsFile", "average_weights", "write_weights"]
