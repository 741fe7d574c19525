"""Builders of the rows that treat parts of the gradients, or what a bad step did."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_tricks.callbacks import GradientClipping, SpikeRecovery, UnitwiseAdaptive
from tests.conformance.model import Classifier

if TYPE_CHECKING:
    import lightning as L

    from tests.conformance.cases import Run


class Descent(Classifier):
    """With plain SGD: unlike Adam's, its steps are as long as the gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def _run(*arguments: Any, **options: Any) -> "Run":
    from tests.conformance.cases import Run  # which imports this file

    return Run(*arguments, **options)


def clipping_by_unit() -> "Run":
    policy = UnitwiseAdaptive(0.1, exclude=["head"])
    return _run(Descent(), (GradientClipping(policy),), trainer={"accumulate_grad_batches": 2})


def check_clipped_share(outcome: dict[str, Any]) -> None:
    shares = outcome["logged"]["grad_norm/clipped"]["values"]
    assert len(shares) == outcome["steps"] == 12, "not once per optimizer step"
    assert ((shares > 0) & (shares < 0.9)).all(), f"clips all units, or none: choose another ratio: {shares}"


PARTS = {"encoder.blocks.*": 0.415, "head": 0.38}


def clipping_by_part() -> "Run":
    return _run(Descent(), (GradientClipping(dict(PARTS)),), trainer={"accumulate_grad_batches": 2})


def check_parts(outcome: dict[str, Any]) -> None:
    logged = outcome["logged"]
    for part, limit in PARTS.items():
        norms, clipped = (logged[f"grad_norm/{name}"]["values"] for name in (part, f"clipped/{part}"))
        assert ((norms > limit) == clipped.bool()).all()
        assert len(clipped) == outcome["steps"] == 12
        assert 0 < clipped.sum() < 12, f"clips every step, or none: choose another limit for {part}: {norms}"
        assert (norms - limit).abs().min() > 0.002, f"too near: rounding would decide: {norms}"


class Spiking(Classifier):
    """One batch before the checkpoint and one after it have a loss that is fifty times the usual."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) * (50 if self.training and self.trainer.global_step in SPIKES else 1)


SPIKES = (9, 17)  # the checkpoint is written after 11 steps


def spike_recovery() -> "Run":
    return _run(Spiking(), (SpikeRecovery(threshold=10.0, window=8, every_n_steps=2),))


def observe_spike_recovery(run: "Run", trainer: "L.Trainer") -> dict[str, Any]:
    schedule = trainer.lr_scheduler_configs[0].scheduler.last_epoch
    return {"rollbacks": run.callbacks[0].rollbacks, "schedule": schedule}


def check_spike_recovery(outcome: dict[str, Any]) -> None:
    assert outcome["steps"] == 21
    assert outcome["facts"]["rollbacks"] == 2
    assert outcome["facts"]["schedule"] < 21 - 2 * 2, "the schedule was not rolled back"
    rollbacks = outcome["logged"]["rollbacks"]["values"].tolist()
    assert rollbacks == [0] * 9 + [1] * 8 + [2] * 4
