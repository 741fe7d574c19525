"""Rows of CheckpointEnsemble's policies: members by the learning rate's cycles, a greedy soup, members kept apart."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_tricks.callbacks import CheckpointEnsemble, Cyclic, GreedySoup, LastK, Predictions
from lightning_tricks.functional import cosine_restarts
from tests.conformance.compare import differences
from tests.conformance.model import Classifier, full_weights

CYCLES, RATE = 3, 3e-3  # without a warm-up, Adam's first steps are as long as the rate


class Weights(L.Callback):
    """Keeps the whole weights after each optimizer step; they outlive an interruption."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights[trainer.global_step] = full_weights(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]


class Unscheduled(Classifier):
    """Its rate is the callback's alone."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE)


class Rates(L.Callback):
    """Logs the rate of each step: set before the batch, it is what the step takes."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        pl_module.log("rate", trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)


def cyclic() -> Any:
    from tests.conformance.cases import Run

    return Run(Unscheduled(), (CheckpointEnsemble(Cyclic(CYCLES)), Weights(), Rates()))


def ensemble_file(run: Any) -> dict[str, Any]:
    """What the ensemble's file holds."""
    file = torch.load(run.callbacks[0].path, weights_only=True)
    return {"file": file["state_dict"], "members": [member["step"] for member in file["lightning_tricks"]["ensemble"]]}


def observe_cyclic(run: Any, trainer: L.Trainer) -> dict[str, Any]:
    return {**ensemble_file(run), "weights": run.callbacks[1].weights}


def check_cyclic(outcome: dict[str, Any]) -> None:
    steps, facts = outcome["steps"], outcome["facts"]
    shares = [cosine_restarts(step, steps, CYCLES) for step in range(steps)]
    assert torch.allclose(outcome["logged"]["rate"]["values"], RATE * torch.tensor(shares, dtype=torch.float64))
    assert (facts["members"], steps) == ([7, 14, 21], 21)
    holds_the_mean(facts["file"], [facts["weights"][step] for step in facts["members"]])


def greedy_soup() -> Any:
    from tests.conformance.cases import Run, WeightsAtValidation

    ensemble = CheckpointEnsemble(LastK(3), GreedySoup("val/loss"))
    return Run(Classifier(), (ensemble, WeightsAtValidation()))


def observe_greedy_soup(run: Any, trainer: L.Trainer) -> dict[str, Any]:
    soup, spy = run.callbacks[:2]
    facts = {"results": soup.results, "rejected": sorted(soup.rejected), "at_validation": spy.weights}
    return {**ensemble_file(run), **facts}


def check_greedy_soup(outcome: dict[str, Any]) -> None:
    facts = outcome["facts"]
    assert len(facts["members"]) + len(facts["rejected"]) == 3
    losses = outcome["logged"]["val/loss"]["values"]
    assert abs(facts["results"]["best"]["val/loss"] - losses.min()) < 1e-6
    assert facts["results"]["ensemble"]["val/loss"] <= facts["results"]["best"]["val/loss"]
    holds_the_mean(facts["file"], [facts["at_validation"][step] for step in facts["members"]])


def predictions() -> Any:
    from tests.conformance.cases import Run, WeightsAtValidation

    return Run(Classifier(), (CheckpointEnsemble(LastK(2), Predictions()), WeightsAtValidation()))


def observe_predictions(run: Any, trainer: L.Trainer) -> dict[str, Any]:
    ensemble, spy = run.callbacks[:2]
    files = [torch.load(path, weights_only=True) for path in ensemble.paths]
    steps = [file["lightning_tricks"]["ensemble"][0]["step"] for file in files]
    return {"members": steps, "first": files[0]["state_dict"], "last": files[1]["state_dict"], "seen": spy.weights}


def check_predictions(outcome: dict[str, Any]) -> None:
    facts = outcome["facts"]
    assert facts["members"] == [21, 14]
    for name, step in (("first", 21), ("last", 14)):
        Classifier().load_state_dict(facts[name])
        assert not list(differences(facts[name], facts["seen"][step], tolerance=0.0))


def holds_the_mean(file: dict[str, Tensor], members: list[dict[str, Tensor]]) -> None:
    """The file has the members' mean, and loads strictly."""
    floating = [name for name, value in file.items() if value.is_floating_point()]
    mean = {name: sum(member[name].double() for member in members).div(len(members)).float() for name in floating}
    assert not list(differences({name: file[name] for name in floating}, mean, tolerance=1e-6))
    Classifier().load_state_dict(file)
