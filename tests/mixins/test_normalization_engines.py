"""Normalised losses on every engine: traps B2 to B6, against torch alone with one big batch for each window."""

import importlib.util

import pytest
import torch

from tests.conformance.engines import Group
from tests.mixins.normalization_jobs import LIMIT, expected

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]
OFFLOADED = ["fsdp2_offload", pytest.param("zero_2_offload", marks=ZERO), pytest.param("zero_3_offload", marks=ZERO)]
NEAR = {"32-true": 2e-5, "bf16-mixed": 3e-2, "16-mixed": 1e-2}  # relative to each tensor's largest value
MATCH = {"32-true": 2e-5, "bf16-mixed": 2e-2, "16-mixed": 1e-2}  # of losses and norms


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks, or on one; what rank 0 returns, and the weights."""
    folder = tmp_path_factory.mktemp("normalization")
    groups = {n: Group(n, folder / f"{n}", "tests.mixins.normalization_jobs:quiet") for n in (1, 2)}

    def run(name, strategy, **arguments):
        group = groups[1 if strategy == "auto" else 2]
        return group.call(f"tests.mixins.normalization_jobs:{name}", strategy=strategy, **arguments)

    def fit(strategy, kind, precision, **options):
        first, *others = run("fit", strategy, kind=kind, precision=precision, folder=str(folder), **options)
        assert all(other["logged"] == first["logged"] for other in others) or kind == "plain"
        return first, torch.load(folder / "weights.pt", weights_only=True)

    yield {"run": run, "fit": fit}
    for group in groups.values():
        group.close()


def distance(found, wanted):
    """The largest deviation, relative to each tensor's largest value."""
    return max(
        float((found[name].double() - value.double()).abs().max() / value.double().abs().max())
        for name, value in wanted.items()
    )


def as_one_big_batch(job, strategy, kind, precision, **options):
    seen, weights = job["fit"](strategy, kind, precision, **options)
    wanted = expected(kind, **options)
    assert distance(weights, wanted["weights"]) < NEAR[precision]
    logged = [value for value, applied in zip(seen["logged"], seen["applied"], strict=True) if applied]
    assert logged == pytest.approx(wanted["losses"], rel=MATCH[precision])
    assert seen["applied"] == [True, True, False, True] * 2, "a window with nothing in it is skipped"
    assert seen["warnings"] == 1
    assert seen["rate"] == pytest.approx(wanted["rate"])
    assert seen["outputs"] == pytest.approx(seen["told"]), "callbacks get the loss divided"
    return seen, wanted


@pytest.mark.parametrize("strategy", ["auto", *ENGINES, *OFFLOADED])
def test_b2_b3_b4_b6_a_window_of_ragged_micro_batches_is_one_big_batch(job, strategy):
    as_one_big_batch(job, strategy, "tokens", "32-true")


@pytest.mark.parametrize("strategy", ["auto", *ENGINES])
def test_in_low_precision(job, strategy):
    as_one_big_batch(job, strategy, "tokens", "bf16-mixed")


def test_with_a_gradient_scaler(job):
    as_one_big_batch(job, "auto", "tokens", "16-mixed")


@pytest.mark.parametrize("kind", ["classes", "both"])
@pytest.mark.parametrize("strategy", ["auto", *ENGINES])
def test_b5_the_weighted_denominator_is_that_of_the_window(job, strategy, kind):
    as_one_big_batch(job, strategy, kind, "32-true")


@pytest.mark.parametrize("kind", ["focal", "smoothed", "adjusted", "labels"])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_other_losses_are_those_of_the_window_too(job, strategy, kind):
    as_one_big_batch(job, strategy, kind, "32-true")


@pytest.mark.parametrize("strategy", ["auto", *ENGINES, *OFFLOADED])
def test_norms_and_clipping_are_of_the_true_mean(job, strategy):
    seen, wanted = as_one_big_batch(job, strategy, "tokens", "32-true", clip=True)
    norms = [norm for norm, applied in zip(seen["norms"], seen["applied"], strict=True) if applied]
    assert norms == pytest.approx(wanted["norms"], rel=1e-4)
    assert min(norms) < LIMIT < max(norms), "clips every step, or none: choose another limit"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_plain_lightning_is_something_else(job, strategy, precision):
    seen, weights = job["fit"](strategy, "plain", precision)
    assert distance(weights, expected("tokens")["weights"]) > 3 * NEAR[precision]
    assert seen["outputs"] == pytest.approx([value / 2 for value in seen["told"]]), "B6"


@pytest.mark.parametrize("fault", ["negative", "infinite", "no gradient"])
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero_3", marks=ZERO)])
def test_what_is_wrong_on_one_rank_is_told_on_all(job, strategy, fault):
    first, second = job["run"]("fail", strategy, fault=fault)
    assert "a `count` that is negative or not finite, on this rank or another" in first
    assert ("`sum_of_losses` has no gradient" if fault == "no gradient" else first) in second


def test_a_guard_names_the_rank_whose_loss_is_not_finite(job):
    for told in job["run"]("poisoned", "ddp"):
        assert "epoch 0, batches 0 to 1 (the loss on rank 1)" in told


def test_an_output_wrapped_by_ddp_is_recognised(job):
    as_one_big_batch(job, "ddp_find_unused_parameters_true", "tokens", "32-true")
