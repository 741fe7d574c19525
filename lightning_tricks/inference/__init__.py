"""What is done with trained weights: averaging checkpoints, and ensembles of their predictions."""

from lightning_tricks.inference.averaging import Averaged, average_checkpoints
from lightning_tricks.inference.prediction_ensemble import PredictionEnsemble
from lightning_tricks.inference.soup import Soup, greedy_soup

__all__ = ["Averaged", "PredictionEnsemble", "Soup", "average_checkpoints", "greedy_soup"]
