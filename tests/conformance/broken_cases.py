"""Rows of tricks that are wrong in the ways that the matrix is there to catch. `test_broken_cases.py` runs them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tricks.engines import engine_of
from lightning_tricks.errors import UnsupportedError
from tests.conformance.cases import Case, Descent, Run, check_learned
from tests.conformance.model import Classifier, Sequences


class LocalMean(Classifier):
    """A class-weighted loss whose denominator is that of the rank alone."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        counts = Sequences(54, seed=1).labels.bincount()
        return F.cross_entropy(logits.float(), labels, weight=54 / (3 * counts))


class LocalClipping(L.Callback):
    """Clips by the norm of this rank's shards, or of this rank's gradients before they are averaged."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        shards = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        coefficient = (0.4 / torch.stack([shard.norm() for shard in shards]).norm()).clamp(max=1.0)
        for shard in shards:
            shard.mul_(coefficient)


class Forgetful(L.Callback):
    """Raises the weight decay with every step that it has counted, and does not save the count."""

    steps = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.steps += 1
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01 * self.steps


class Refused(L.Callback):
    """Cannot run on several devices."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        engine = engine_of(trainer)
        if engine.world_size > 1:
            raise UnsupportedError("Refused", engine.name, "it needs one device", "use one")


def local_mean() -> Run:
    return Run(LocalMean())


def local_clipping() -> Run:
    return Run(Descent(), (LocalClipping(),))


def forgetful() -> Run:
    return Run(Classifier(), (Forgetful(),))


def refused() -> Run:
    return Run(Classifier(), (Refused(),))


CASES = (
    Case("LocalMean", local_mean, check_learned),
    Case("LocalClipping", local_clipping, check_learned),
    Case("Forgetful", forgetful, check_learned),
    Case("Refused", refused, check_learned),
)
