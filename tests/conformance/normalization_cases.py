"""The matrix's row of LossNormalizationMixin."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tricks.mixins import LossNormalizationMixin
from tests.conformance.model import Classifier, loader

__all__ = ["check_loss_normalization", "loss_normalization"]

UNEVEN = 53  # the last global batch has 5 samples: 3 on one rank, 2 on the other
LEFT_OUT = (
    0  # the most frequent class whose samples do not count: ranks and micro-batches have as many as chance gives them
)


class Normalized(LossNormalizationMixin, Classifier):
    """The mean over the samples that count, of windows of two batches; the last window of an epoch has one."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.float(), labels, ignore_index=LEFT_OUT, reduction="sum")
        return self.normalized_loss(losses, (labels != LEFT_OUT).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)  # whose steps are as long as the gradients


def loss_normalization() -> Any:
    from tests.conformance.cases import Run

    return Run(Normalized(), trainer={"accumulate_grad_batches": 2}, samples=UNEVEN)


def check_loss_normalization(outcome: dict[str, Any]) -> None:
    """The first logged loss is torch's own, of two global batches as one."""
    L.seed_everything(0, verbose=False)
    module, batches = Normalized(), iter(loader(UNEVEN, seed=1))
    logits, labels = zip(
        *((module(tokens), labels) for tokens, labels in (next(batches) for _ in range(2))), strict=True
    )
    whole = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=LEFT_OUT)
    parts = [F.cross_entropy(*part, ignore_index=LEFT_OUT) for part in zip(logits, labels, strict=True)]
    logged = outcome["logged"]["train/loss"]["values"]
    assert len(logged) == outcome["steps"] == 12
    assert abs(logged[0] - whole) < 1.5e-3 < abs(sum(parts) / 2 - whole) / 2, (logged[0], whole, parts)
