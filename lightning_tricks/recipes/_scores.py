"""What a classifier is measured by, exactly over batches and ranks."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassRecall

__all__ = ["Scores"]


class Scores(nn.Module):
    """Weighted cross-entropy, accuracy, macro-F1 and the recall of each class.

    Args:
        labels: the classes' names.

    Example:
        >>> import torch
        >>> scores = Scores(["no", "yes"])
        >>> scores.update(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]), torch.ones(2))
        >>> {name: round(value.item(), 3) for name, value in scores.compute().items()}
        {'loss': 0.813, 'accuracy': 0.5, 'macro_f1': 0.333, 'recall_no': 1.0, 'recall_yes': 0.0}
    """

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = list(labels)
        self.loss = MeanMetric()
        self.shares = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(len(labels), average="micro"),
                "macro_f1": MulticlassF1Score(len(labels), average="macro"),
            }
        )
        self.recall = MulticlassRecall(len(labels), average=None)

    def update(self, logits: Tensor, targets: Tensor, class_weights: Tensor) -> None:
        """Count a batch in: logits (batch, classes) in fp32, targets (batch,)."""
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        self.loss.update(losses, class_weights[targets])
        self.shares.update(logits, targets)
        self.recall.update(logits, targets)

    def compute(self) -> dict[str, Tensor]:
        """The values over all ranks. Collective."""
        recalls = zip(self.labels, self.recall.compute(), strict=True)
        values = {"loss": self.loss.compute(), **self.shares.compute()}
        return {**values, **{f"recall_{label}": value for label, value in recalls}}

    def reset(self) -> None:
        """Start over."""
        for metric in (self.loss, self.shares, self.recall):
            metric.reset()
