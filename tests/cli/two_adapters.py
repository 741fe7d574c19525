"""A classifier with a second adapter, as a user writes one: the command finds it by its class path."""

from lightning_tricks.mixins import LoRA
from lightning_tricks.recipes import TextClassifier


class TwoAdapters(TextClassifier):
    def __init__(self, labels, **options):
        super().__init__(labels, **options)
        self.adapt(self.encoder, LoRA(rank=3, alpha=6, targets=("query",)), name="french")
