"""Builders of the rows that treat parts of the gradients, or what a bad step did."""

from typing import TYPE_CHECKING, Any

import torch

from lightning_tricks.callbacks import GradientClipping, UnitwiseAdaptive
from tests.conformance.model import Classifier

if TYPE_CHECKING:
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
