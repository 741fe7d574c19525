"""The matrix's row of BatchSizeAccumulation."""

from typing import Any

import torch
from torch import Tensor

from lightning_tricks.callbacks import BatchSizeAccumulation
from tests.conformance.model import GLOBAL_BATCH, Classifier

__all__ = ["batch_size_accumulation", "check_batch_size_accumulation"]


class Accumulating(Classifier):
    """With plain SGD, whose steps are as long as the gradients, and a log of what is accumulated."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.log("batches", float(self.trainer.accumulate_grad_batches), on_step=True, on_epoch=False)
        return super().training_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def batch_size_accumulation() -> Any:
    """One global batch a step, and from the fifth step on two: from batch 6, with which the first epoch ends."""
    from tests.conformance.cases import Run

    return Run(Accumulating(), (BatchSizeAccumulation({0: GLOBAL_BATCH, 5: 2 * GLOBAL_BATCH}),))


def check_batch_size_accumulation(outcome: dict[str, Any]) -> None:
    assert outcome["steps"] == 15
    assert outcome["logged"]["batches"]["values"].tolist() == [1] * 6 + [2] * 9
