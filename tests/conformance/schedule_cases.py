"""The matrix's row of LearningRateSchedule."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from lightning_tricks.callbacks import Cosine, LearningRateSchedule, NonFiniteGuard
from tests.conformance.model import Classifier

__all__ = ["check_learning_rate_schedule", "learning_rate_schedule"]

RATE, WARMUP, STEPS = 1e-2, 4, 12


class Scheduled(Classifier):
    """Without a schedule of its own, two parameter groups; one batch of each epoch is not finite, on the last rank."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.log("lr", self.trainer.optimizers[0].param_groups[1]["lr"], on_step=True, on_epoch=False)
        loss = super().training_step(batch)
        bad = batch_idx == 2 and self.trainer.global_rank == self.trainer.world_size - 1
        return loss * float("nan") if bad else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.encoder.parameters()}, {"params": self.head.parameters(), "lr": 2 * RATE}]
        return torch.optim.AdamW(groups, lr=RATE)


def learning_rate_schedule() -> Any:
    from tests.conformance.cases import Run

    schedule = LearningRateSchedule(Cosine(end=0.1), warmup=WARMUP, start=0.25)
    return Run(Scheduled(), (schedule, NonFiniteGuard()), trainer={"accumulate_grad_batches": 2})


def check_learning_rate_schedule(outcome: dict[str, Any]) -> None:
    """Torch's own rates, one for each step; a dropped step's is used again."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2 * RATE)
    warmup = LinearLR(optimizer, start_factor=0.25, total_iters=WARMUP)
    cosine = CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP, eta_min=0.1 * 2 * RATE)
    torchs, expected = SequentialLR(optimizer, [warmup, cosine], [WARMUP]), []
    for step in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        if step % 4 != 1:
            optimizer.step()
            torchs.step()
    assert outcome["steps"] == STEPS
    assert torch.allclose(outcome["logged"]["lr"]["values"], torch.tensor(expected).double(), rtol=1e-5)
