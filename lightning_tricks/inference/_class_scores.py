"""What an ensemble's probabilities are measured by, exactly over batches and ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

__all__ = ["CalibrationError", "ClassScores"]


class CalibrationError(Metric):
    """The expected calibration error: |confidence - accuracy|, weighed by the samples of each of some bins.

    Keeps three numbers a bin, however many samples there are.

    Args:
        bins: of equal width in (0, 1]; 10 to 20 is usual.

    Example:
        >>> error = CalibrationError(bins=10)
        >>> error.update(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]))
        >>> error.compute()
        tensor(0.4000)

    References:
        Guo et al.: On calibration of modern neural networks (ICML 2017).
    """

    full_state_update = False
    counts: Tensor
    confidences: Tensor
    hits: Tensor

    def __init__(self, bins: int = 15, **options: Any) -> None:
        super().__init__(**options)
        for name in ("counts", "confidences", "hits"):
            self.add_state(name, torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Count a batch in: probabilities (batch, classes), targets (batch,)."""
        confidence, chosen = probabilities.double().max(-1)
        bins = len(self.counts)
        place = (confidence * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
        self.counts.index_add_(0, place, torch.ones_like(confidence))
        self.confidences.index_add_(0, place, confidence)
        self.hits.index_add_(0, place, (chosen == targets).double())

    def compute(self) -> Tensor:
        """The error over all samples, fp32."""
        return ((self.confidences - self.hits).abs().sum() / self.counts.sum().clamp(min=1)).float()


class ClassScores(nn.Module):
    """Negative log-likelihood, accuracy, macro-F1 and calibration error of probabilities.

    Args:
        classes: how many there are, 2 or more.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "macro_f1": MulticlassF1Score(classes, average="macro"),
                "calibration_error": CalibrationError(),
            }
        )

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Count a batch in: probabilities (batch, classes), fp32; targets (batch,)."""
        likelihood = probabilities.gather(1, targets[:, None]).clamp(min=torch.finfo(probabilities.dtype).tiny)
        for name, metric in self.metrics.items():
            update: Any = metric.update
            update(*((-likelihood.log(),) if name == "loss" else (probabilities, targets)))

    def compute(self) -> dict[str, Tensor]:
        """The values over all ranks. Collective."""
        return {name: metric.compute() for name, metric in self.metrics.items()}  # type: ignore[operator]

    def reset(self) -> None:
        """Start over."""
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]
