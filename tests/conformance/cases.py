"""The rows of the matrix: one for each trick.

How to add a row
    1. Write a top-level function that returns a `Run`: the module to fit, its callbacks, further Trainer options, the
       number of samples. It is called on every rank, with the same seed, before every fit. `tests/conformance/model.py`
       has the module to start from; build on it without dropout, whose masks depend on the number of ranks.
    2. If the trick has outcomes besides the weights and what it logs (a best step, a file), write
       `observe(run, trainer)`: it is called on every rank after a fit and returns plain values and tensors by name.
    3. Write `check(outcome)`: what shows that the trick did something in this fit, so that its cells are not vacuous
       (clipping really clipped), and any truth that needs no second engine (the file is the mean of its members).
    4. Add `Case(trick="YourTrick", build=..., ...)` to `CASES`; `trick` is the exported name.
    5. `make matrix` runs all cells and renders docs/matrix.md; `pytest tests/conformance -k YourTrick` runs the row.

Each cell, on its own engine and precision, does two fits of three epochs: an uninterrupted one, and one that is
interrupted in the second epoch, two batches after its checkpoint, and resumed. It then asserts that
    - the uninterrupted fit gave the outcome of the same fit on one device: the same names, weights within `tolerance`
      of each tensor's largest value, likewise whatever was logged and observed (other values: equal);
    - the resumed fit gave the outcome of the uninterrupted one, within `resume_tolerance` (0: bit for bit);
    - `check` holds.
Global batches are the same on every engine; the last one of an epoch is smaller, and sequences are ragged.

An engine that cannot do the trick exactly must refuse it. Declare that as `refused={(engine, precision): pattern}`:
the cell then asserts that the fit raises `UnsupportedError` with a message in which `re.search(pattern)` finds a match.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tricks.callbacks import (
    CheckpointEnsemble,
    EarlyStopping,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    Percentile,
    TopK,
    Value,
    ZScore,
)
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.engines import whole
from lightning_tricks.mixins import ClassWeightedLossMixin, LoRA, LoRAMixin
from tests.conformance import accumulation_cases as accumulation
from tests.conformance import averaging_cases as averaging
from tests.conformance import data_cases
from tests.conformance import ensemble_cases as ensembles
from tests.conformance import normalization_cases as normalization
from tests.conformance import packing_cases as packing
from tests.conformance import schedule_cases as schedule
from tests.conformance import streaming_cases as streaming
from tests.conformance import unfreezing_cases as unfreezing
from tests.conformance.adapter_cases import ROWS as ADAPTER_ROWS
from tests.conformance.compare import differences
from tests.conformance.gradient_cases import (
    check_clipped_share,
    check_parts,
    check_spike_recovery,
    clipping_by_part,
    clipping_by_unit,
    observe_spike_recovery,
    spike_recovery,
)
from tests.conformance.model import Classifier, Sequences, full_weights, loader

__all__ = ["CASES", "Case", "Run"]

EXACT = {"32-true": 2e-5, "bf16-mixed": 1e-1}

# Of one fit: {"weights", "logged": {name: {"steps", "values"}}, "facts": what `observe` returned, "steps"}.
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is fitted: built anew for each fit."""

    module: L.LightningModule
    callbacks: tuple[L.Callback, ...] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)  # options of the Trainer
    samples: int = 54  # global batches of 8: six whole ones and one of 6
    loader: Callable[[int, int], TricksDataLoader] | None = None  # of samples and ranks; None: the usual one
    validation_samples: int = 28


def nothing(run: Run, trainer: L.Trainer) -> dict[str, Any]:
    """Observe nothing but the weights and what is logged."""
    return {}


@dataclass(frozen=True)
class Case:
    """One row: a trick, how to fit with it, and what must hold.

    Args:
        trick: the trick's exported name.
        build: makes the `Run`.
        check: raises AssertionError if an uninterrupted fit's outcome shows that the trick did nothing, or wrong.
        observe: outcomes besides the weights and what is logged; collective.
        variant: tells several rows of one trick apart.
        tolerance: largest deviation from one device by precision, relative to each tensor's largest value.
        resume_tolerance: the same for resumed against uninterrupted, on one engine.
        refused: pattern of the message with which (engine, precision) refuses the trick.
        at_rest: pattern of the names of weights that are saved and not trained; ZeRO keeps those in bf16 at bf16-mixed.
    """

    trick: str
    build: Callable[[], Run]
    check: Callable[[Outcome], None]
    observe: Callable[[Run, L.Trainer], dict[str, Any]] = nothing
    variant: str = ""
    tolerance: Mapping[str, float] = field(default_factory=lambda: EXACT)
    resume_tolerance: float = 0.0
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    at_rest: str = "^$"

    @property
    def name(self) -> str:
        return f"{self.trick} ({self.variant})" if self.variant else self.trick


# -- no trick ----------------------------------------------------------------------------------------------------------


def plain() -> Run:
    return Run(Classifier())


def plain_accumulating() -> Run:
    """Seven batches in windows of two: the last window of an epoch is half a one."""
    return Run(Classifier(), trainer={"accumulate_grad_batches": 2})


def check_learned(outcome: Outcome) -> None:
    losses = outcome["logged"]["val/loss"]["values"]
    assert losses.min() < losses[0] - 0.1


# -- EarlyStopping -----------------------------------------------------------------------------------------------------


def early_stopping() -> Run:
    """The second epoch is the best; the fourth is the last."""
    stopping = EarlyStopping("val/loss", patience=2)
    return Run(Classifier(), (stopping, WeightsAtValidation()), trainer={"max_epochs": 6})


def observe_early_stopping(run: Run, trainer: L.Trainer) -> dict[str, Any]:
    stopping, spy = run.callbacks
    return {"best_step": stopping.best_step, "best_score": stopping.best_score, "at_validation": spy.weights}


def check_early_stopping(outcome: Outcome) -> None:
    at_validation, best = outcome["facts"]["at_validation"], outcome["facts"]["best_step"]
    losses = outcome["logged"]["val/loss"]["values"]
    assert best == list(at_validation)[int(losses.argmin())] < outcome["steps"] == 28
    assert not same(at_validation[best], at_validation[outcome["steps"]])
    assert same(outcome["weights"], at_validation[best]), "the best weights were not restored"


# -- GradientClipping --------------------------------------------------------------------------------------------------


class Descent(Classifier):
    """With plain SGD: unlike Adam's, its steps are as long as the gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


LIMIT = 0.69  # in a wide gap between the norms of these fits, so that rounding does not decide what is clipped


def gradient_clipping() -> Run:
    return Run(Descent(), (GradientClipping(LIMIT),), trainer={"accumulate_grad_batches": 2})


def check_gradient_clipping(outcome: Outcome) -> None:
    norms, limits, clipped = (outcome["logged"][f"grad_norm/{name}"] for name in ("total", "limit", "clipped"))
    assert len(norms["values"]) == outcome["steps"] == 12, "not once per optimizer step"
    assert (limits["values"] - LIMIT).abs().max() < 1e-6
    assert ((norms["values"] > LIMIT) == clipped["values"].bool()).all()
    assert 0 < clipped["values"].sum() < 12, "clips every step, or none: choose another limit"


class Spiky(Descent):
    """The gradients of two steps, one before the checkpoint and one after it, are thirty times the usual ones."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) * (30 if self.training and self.trainer.global_step in SPIKES else 1)


SPIKES = (4, 9)


def clipping_by_value() -> Run:
    return Run(Descent(), (GradientClipping(Value(0.1)),), trainer={"accumulate_grad_batches": 2})


def check_value(outcome: Outcome) -> None:
    clipped = outcome["logged"]["grad_norm/clipped"]["values"]
    assert 0 < clipped.sum() < len(clipped) == outcome["steps"] == 12, "clips every step, or none: choose another value"


def clipping_by_percentile() -> Run:
    policy = Percentile(60, window=5, warmup=3, warmup_limit=LIMIT)
    return Run(Spiky(), (GradientClipping(policy),), trainer={"accumulate_grad_batches": 2})


def clipping_by_z_score() -> Run:
    policy = ZScore(2.0, decay=0.9, warmup=3, warmup_limit=LIMIT)
    return Run(Spiky(), (GradientClipping(policy),), trainer={"accumulate_grad_batches": 2})


def check_spikes(outcome: Outcome) -> None:
    norms, limits, clipped = (
        outcome["logged"][f"grad_norm/{name}"]["values"] for name in ("total", "limit", "clipped")
    )
    assert len(norms) == outcome["steps"] == 12, "not once per optimizer step"
    assert (limits[:3] - LIMIT).abs().max() < 1e-6, "no warm-up"
    assert len(limits[3:].unique()) > 6, "the limits do not follow the norms"
    spikes = list(SPIKES)
    usual = [step for step in range(12) if step not in spikes]
    assert norms[spikes].min() > 5 * norms[usual].max(), "no spikes: change their factor"
    assert clipped[spikes].all()
    assert limits.max() < 2 * norms[usual].max()


# -- GradientNormMonitor -----------------------------------------------------------------------------------------------


def gradient_norm_monitor() -> Run:
    """Behind clipping in the list, whose gradients it must not see clipped."""
    monitor = GradientNormMonitor(groups={"encoder": "encoder", "head": "head"}, update_ratio_every=2)
    return Run(Descent(), (GradientClipping(LIMIT), monitor), trainer={"accumulate_grad_batches": 2})


def observe_gradient_norm_monitor(run: Run, trainer: L.Trainer) -> dict[str, Any]:
    monitor = run.callbacks[1]
    (series,) = monitor.state_dict()["series"].values()
    norms = torch.tensor([norm for _, norm, _ in series["points"]])
    counts = {name: series[name] for name in ("seen", "limited", "clipped", "skipped")}
    return {**counts, "norms": norms, "quantiles": torch.tensor(monitor.quantiles([0.05, 0.5, 0.95]))}


def check_gradient_norm_monitor(outcome: Outcome) -> None:
    logged, facts = outcome["logged"], outcome["facts"]
    total, encoder, head = (logged[f"grad_norm/{name}"]["values"] for name in ("total", "encoder", "head"))
    assert torch.allclose(torch.hypot(encoder, head), total, rtol=2e-3), "groups were measured after clipping"
    assert (facts["seen"], facts["limited"], facts["skipped"]) == (12, 12, [])
    assert facts["clipped"] == logged["grad_norm/clipped"]["values"].sum()
    assert abs(logged["grad_norm/clipped_share"]["values"][-1] - facts["clipped"] / 12) < 1e-6
    assert torch.allclose(facts["norms"].double(), total, rtol=1e-6)
    ratios = logged["update_ratio/total"]["values"]
    assert (ratios[0::2] == ratios[1::2]).all(), "measured in every step"  # a logger is given the last value again
    assert len(ratios.unique()) == 6
    assert ((ratios > 1e-3) & (ratios < 0.1)).all(), ratios


# -- NonFiniteGuard ----------------------------------------------------------------------------------------------------


class Poisoned(Classifier):
    """The third batch of every epoch has a loss that is not finite, on the last rank."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch)
        last = self.trainer.global_rank == self.trainer.world_size - 1
        return loss * float("nan") if batch_idx == 2 and last else loss


def non_finite_guard() -> Run:
    """Windows of two batches, of which each epoch's second one is dropped."""
    return Run(Poisoned(), (NonFiniteGuard(),), trainer={"accumulate_grad_batches": 2})


def observe_non_finite_guard(run: Run, trainer: L.Trainer) -> dict[str, Any]:
    (guard,) = run.callbacks
    return {"skipped_steps": guard.skipped_steps, "schedule": trainer.lr_scheduler_configs[0].scheduler.last_epoch}


def check_non_finite_guard(outcome: Outcome) -> None:
    assert outcome["facts"] == {"skipped_steps": 3, "schedule": 9}
    assert outcome["steps"] == 12
    assert outcome["logged"]["skipped_steps"]["values"].tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert all(value.isfinite().all() for value in outcome["weights"].values())


# -- CheckpointEnsemble ------------------------------------------------------------------------------------------------


def checkpoint_ensemble() -> Run:
    """The best two of four epochs: the first is a member until it is replaced, the last never is."""
    ensemble = CheckpointEnsemble(TopK(2, monitor="val/loss"))
    return Run(Classifier(), (ensemble, WeightsAtValidation()), trainer={"max_epochs": 4})


def observe_checkpoint_ensemble(run: Run, trainer: L.Trainer) -> dict[str, Any]:
    ensemble, spy = run.callbacks
    file = torch.load(ensemble.path, weights_only=True)
    members = [member["step"] for member in file["lightning_tricks"]["ensemble"]]
    facts = {"members": members, "scores": ensemble.scores, "results": ensemble.results}
    return {**facts, "file": file["state_dict"], "at_validation": spy.weights}


def check_checkpoint_ensemble(outcome: Outcome) -> None:
    facts, losses = outcome["facts"], outcome["logged"]["val/loss"]["values"]
    at_validation = facts["at_validation"]
    steps = list(at_validation)
    assert facts["members"] == sorted(steps[i] for i in losses.argsort()[:2].tolist()) != steps[-2:]
    first, second = (at_validation[step] for step in facts["members"])
    mean = {name: (first[name] + second[name]) / 2 for name in first if first[name].is_floating_point()}
    assert not list(differences({name: facts["file"][name] for name in mean}, mean, tolerance=1e-6))
    Classifier().load_state_dict(facts["file"])
    assert same(outcome["weights"], at_validation[steps[-1]]), "the fit's own weights were touched"
    assert facts["results"]["best"]["val/loss"] == losses.min()
    assert facts["results"]["ensemble"]["val/loss"] != losses.min()


# -- LoRAMixin ---------------------------------------------------------------------------------------------------------


class Adapted(LoRAMixin, Classifier):
    """Adapters on two projections; the last norm of the encoder and the head, which is outside it, are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.adapt(self.encoder, LoRA(rank=4, alpha=8, targets=("query", "value")), trainable=("norm",))


def lora() -> Run:
    return Run(Adapted())


def frozen(module: L.LightningModule) -> dict[str, Tensor]:
    """The frozen parameters, whole. Collective."""
    return {name: whole(p).float().clone() for name, p in module.named_parameters() if not p.requires_grad}


def observe_lora(run: Run, trainer: L.Trainer) -> dict[str, Any]:
    return {"base": frozen(run.module)}


def check_lora(outcome: Outcome) -> None:
    L.seed_everything(0, verbose=False)
    fresh = Adapted()
    assert outcome["weights"].keys() == fresh.state_dict().keys(), "a checkpoint holds what is trained, and that alone"
    for name, value in fresh.state_dict().items():
        assert not torch.equal(outcome["weights"][name], value), f"{name} was not trained"
    base = frozen(fresh)
    rounded = {name: value.bfloat16().float() for name, value in base.items()}  # where an engine keeps it in bf16
    assert same(outcome["facts"]["base"], base) or same(outcome["facts"]["base"], rounded), "the base has moved"


# -- ClassWeightedLossMixin --------------------------------------------------------------------------------------------


class Weighted(ClassWeightedLossMixin, Classifier):
    """Trained with the weighted loss; the base class's validation is not weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh_classes(Sequences(UNEVEN, seed=1).labels.bincount().tolist())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.class_weighted_loss(logits, labels)


UNEVEN = 53  # the last global batch has 5 samples: 3 on one rank, 2 on the other


def class_weighted_loss() -> Run:
    return Run(Weighted(), samples=UNEVEN)


def check_class_weighted_loss(outcome: Outcome) -> None:
    """The first loss is torch's own, of the whole global batch."""
    L.seed_everything(0, verbose=False)
    module, (tokens, labels) = Weighted(), next(iter(loader(UNEVEN, seed=1)))
    weights = UNEVEN / (3 * Sequences(UNEVEN, seed=1).labels.bincount())
    weighted = F.cross_entropy(module(tokens), labels, weight=weights)
    first = outcome["logged"]["train/loss"]["values"][0]
    assert abs(first - weighted) < 5e-3 < abs(first - F.cross_entropy(module(tokens), labels))
    assert torch.allclose(outcome["weights"]["class_weights"], weights, rtol=1e-6)


CASES = (
    Case("Plain", plain, check_learned),
    Case("Plain", plain_accumulating, check_learned, variant="accumulating"),
    Case("EarlyStopping", early_stopping, check_early_stopping, observe_early_stopping),
    Case("GradientClipping", gradient_clipping, check_gradient_clipping),
    Case("GradientClipping", clipping_by_percentile, check_spikes, variant="Percentile"),
    Case("GradientClipping", clipping_by_z_score, check_spikes, variant="ZScore"),
    Case(
        "GradientClipping",
        clipping_by_value,
        check_value,
        variant="Value",
    ),
    Case("GradientClipping", clipping_by_unit, check_clipped_share, variant="UnitwiseAdaptive"),
    Case("GradientClipping", clipping_by_part, check_parts, variant="parts"),
    Case("GradientNormMonitor", gradient_norm_monitor, check_gradient_norm_monitor, observe_gradient_norm_monitor),
    Case("NonFiniteGuard", non_finite_guard, check_non_finite_guard, observe_non_finite_guard),
    Case("BatchSizeAccumulation", accumulation.batch_size_accumulation, accumulation.check_batch_size_accumulation),
    Case("SpikeRecovery", spike_recovery, check_spike_recovery, observe_spike_recovery),
    Case("LearningRateSchedule", schedule.learning_rate_schedule, schedule.check_learning_rate_schedule),
    Case(
        "LayerwiseUnfreezing",
        unfreezing.layerwise_unfreezing,
        unfreezing.check_layerwise_unfreezing,
        unfreezing.observe_layerwise_unfreezing,
    ),
    Case("CheckpointEnsemble", checkpoint_ensemble, check_checkpoint_ensemble, observe_checkpoint_ensemble),
    Case("WeightAveraging", lambda: Run(*averaging.ema()), averaging.check_ema, averaging.observe_averaging),
    Case("WeightAveraging", lambda: Run(*averaging.swa()), averaging.check_swa, averaging.observe_averaging, "SWA"),
    Case("WeightAveraging", lambda: Run(*averaging.lawa()), averaging.check_lawa, averaging.observe_averaging, "LAWA"),
    Case("CheckpointEnsemble", ensembles.cyclic, ensembles.check_cyclic, ensembles.observe_cyclic, variant="Cyclic"),
    Case(
        "CheckpointEnsemble",
        ensembles.greedy_soup,
        ensembles.check_greedy_soup,
        ensembles.observe_greedy_soup,
        variant="GreedySoup",
    ),
    Case(
        "CheckpointEnsemble",
        ensembles.predictions,
        ensembles.check_predictions,
        ensembles.observe_predictions,
        variant="Predictions",
    ),
    Case("LoRAMixin", lora, check_lora, observe_lora),
    *(
        Case("AdapterMixin", row.build, row.check, row.observe, variant=name, at_rest=row.at_rest)
        for name, row in ADAPTER_ROWS.items()
    ),
    Case("ClassWeightedLossMixin", class_weighted_loss, check_class_weighted_loss),
    Case("LossNormalizationMixin", normalization.loss_normalization, normalization.check_loss_normalization),
    Case("LengthBucketSampler", data_cases.length_bucket_sampler, data_cases.check_length_bucket_sampler),
    Case(
        "ClassBalancedSampler",
        data_cases.class_balanced_sampler,
        data_cases.check_class_balanced_sampler,
        tolerance={"32-true": 2e-5, "bf16-mixed": 3e-1},  # a bias that hardly moves: Adam makes full steps of rounding
    ),
    Case("SequencePacker", packing.sequence_packer, packing.check_sequence_packer),
    Case("FeatureNormalizer", data_cases.feature_normalizer, data_cases.check_feature_normalizer),
    Case(
        "SequenceLengthWarmup",
        data_cases.sequence_length_warmup,
        data_cases.check_sequence_length_warmup,
        data_cases.observe_sequence_length_warmup,
    ),
    Case("StreamingSampler", streaming.streaming_sampler, streaming.check_streaming_sampler),
)


# -- help for checks ---------------------------------------------------------------------------------------------------


class WeightsAtValidation(L.Callback):
    """Keeps the whole weights at the end of each validation, by optimizer step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.weights[trainer.global_step] = full_weights(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal in every bit."""
    return not list(differences(first, second, tolerance=0.0))
