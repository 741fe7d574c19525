"""The rows of WeightAveraging."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_tricks.callbacks import EMA, LAWA, SWA, WeightAveraging
from lightning_tricks.callbacks import AveragingPolicy as Policy
from tests.conformance.model import Classifier, full_weights


class Trail(L.Callback):
    """The raw weights after each optimizer step, and those that each validation saw, whole."""

    def __init__(self) -> None:
        self.raw: dict[int, dict[str, Tensor]] = {}
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.raw[trainer.global_step] = full_weights(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seen[trainer.global_step] = full_weights(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"raw": dict(self.raw), "seen": dict(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.raw, self.seen = state_dict["raw"], state_dict["seen"]


def averaging(policy: Policy) -> Any:
    """What `Run` takes: a module, its callbacks, options of the Trainer."""
    return Classifier(), (WeightAveraging(policy), Trail()), {"accumulate_grad_batches": 2}


def ema() -> Any:
    return averaging(EMA(0.8))


def swa() -> Any:
    return averaging(SWA(start=0.5))


def lawa() -> Any:
    return averaging(LAWA(k=2))


def observe_averaging(run: Any, trainer: L.Trainer) -> dict[str, Any]:
    found, trail = run.callbacks
    return {"updates": found.updates, "raw": trail.raw, "seen": trail.seen}


def weighted(raw: dict[int, dict[str, Tensor]], shares: dict[int, float]) -> dict[str, Tensor]:
    """The average with these shares of the weights after these steps, in double precision."""
    names = [name for name, value in raw[1].items() if value.is_floating_point()]
    return {name: sum(share * raw[step][name].double() for step, share in shares.items()) for name in names}


def check_averaging(outcome: dict[str, Any], shares: dict[int, float], updates: int) -> None:
    """The module ends with the average that the last validation saw; the raw weights went on by themselves."""
    facts = outcome["facts"]
    assert (facts["updates"], outcome["steps"]) == (updates, 12)
    assert abs(sum(shares.values()) - 1) < 1e-12
    expected = weighted(facts["raw"], shares)
    for weights in (outcome["weights"], facts["seen"][12]):
        for name, value in expected.items():
            assert torch.allclose(weights[name].double(), value, rtol=1e-5, atol=1e-6), name
    last = facts["raw"][12]
    assert any((last[name].double() - value).abs().max() > 1e-3 for name, value in expected.items()), "nothing averaged"
    losses = outcome["logged"]["val/loss"]["values"]
    assert losses[-1] < losses[0]


def check_ema(outcome: dict[str, Any]) -> None:
    shares = {1: 1.0}
    for update in range(1, 12):
        decay = min(0.8, (1 + update) / (10 + update))
        shares = {step: share * decay for step, share in shares.items()} | {update + 1: 1 - decay}
    check_averaging(outcome, shares, 12)


def check_swa(outcome: dict[str, Any]) -> None:
    check_averaging(outcome, {8: 0.5, 12: 0.5}, 2)


def check_lawa(outcome: dict[str, Any]) -> None:
    check_averaging(outcome, {8: 0.5, 12: 0.5}, 3)
