"""Weights on disk: streamed, atomic, safe to load."""

from lightning_tricks.storage.weights_file import WeightsFile, write_weights

__all__ = ["WeightsFile", "write_weights"]
