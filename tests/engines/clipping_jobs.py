"""Adaptive clipping, as jobs that a `Group` runs on every rank."""

from pathlib import Path

import lightning as L
import torch

from lightning_tricks.callbacks import GradientClipping, Percentile, ZScore
from tests.engines.checks import Net, Run, weights_of
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]


class Disturbed(Net):
    """Its loss is not a number on rank 1 in step 5, and two thousand times as large everywhere in step 7."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        bad = self.global_step == 5 and self.global_rank == self.trainer.world_size - 1
        return loss * (float("nan") if bad else 2000.0 if self.global_step == 7 else 1.0)


class Drop(L.Callback):
    """Drops the steps that would poison the weights."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        from lightning_tricks.engines import engine_of

        engine = engine_of(trainer)
        if not bool(engine.gradient_norm(optimizer).isfinite()):
            engine.veto_step(optimizer)


class Limits(L.Callback):
    """What was logged of each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(run: Run, module: Net, *callbacks: L.Callback) -> L.Trainer:
    trainer = run.trainer(*callbacks, max_epochs=1)
    trainer.fit(module)
    return trainer


def spike_after_nan(engine: str, folder: str) -> list[dict[str, float]]:
    """The spike is clipped after a step that was no number, and every statistic is finite."""
    for policy in (Percentile(50, window=6, warmup=3), ZScore(2.0, decay=0.9, warmup=3)):
        limits = Limits()
        run = Run(engine, Path(folder))
        # the guard first: a step that is dropped must find the same norm, whatever the order of the callbacks
        trainer = fit(run, Disturbed(batches=10), Drop(), GradientClipping(policy), limits)
        assert len(limits.rows) == 10
        assert limits.rows[5]["grad_norm/clipped"] == 0.0
        spike = limits.rows[7]
        assert spike["grad_norm/clipped"] == 1.0, spike
        usual = [row["grad_norm/total"] for step, row in enumerate(limits.rows) if step not in (5, 7)]
        assert spike["grad_norm/total"] > 100 * max(usual), spike
        assert spike["grad_norm/limit"] < 2 * max(usual), spike
        assert all(value.isfinite().all() for value in weights_of(trainer).values())
        assert not any(value.isinf().any() for value in policy.state_dict().values())
    return limits.rows[6:]


def unlimited(engine: str, folder: str) -> None:
    """A limit that is infinite, as in the warm-up, changes nothing."""
    run = Run(engine, Path(folder))
    free = weights_of(fit(run, Net(batches=3)))
    clipping = GradientClipping(ZScore(warmup=100))
    found = weights_of(fit(run, Net(batches=3), clipping))
    assert clipping.state_dict()["policies"][0]["seen"] == 3
    for name, value in found.items():
        assert torch.equal(value, free[name]), name
