"""Complete LightningModules and DataModules that stack the tricks."""

from lightning_tricks.recipes.text_classification import TextClassifier
from lightning_tricks.recipes.text_data import TextClassificationData

__all__ = ["TextClassificationData", "TextClassifier"]
