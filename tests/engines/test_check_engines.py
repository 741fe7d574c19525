"""The check before a fit on two real processes: each rank says the same, before the first step."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("check")
    group = Group(2, folder / "ranks", "tests.engines.check_fit_jobs:prepare")
    yield lambda name, engine, **arguments: group.call(
        f"tests.engines.check_fit_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    group.close()


@pytest.mark.parametrize(
    ("engine", "case", "words"),
    [
        ("ddp", "two that clip", "both clip gradients: remove one."),
        ("fsdp2", "two that clip", "both clip gradients: remove one."),
        ("fsdp2", "WeightAveraging", "copies whole parameters, and under fsdp2 a rank holds parts of them"),
        ("fsdp2", "StochasticWeightAveraging", "cannot average what fsdp2 shards"),
        pytest.param("zero_2", "value clipping", "DeepSpeed clips by the norm only", marks=ZERO),
        pytest.param("zero_3", "WeightAveraging", "under zero_3 a rank holds parts of them", marks=ZERO),
        pytest.param("zero_2", "GradientAccumulationScheduler", "no DeepSpeed strategy change the accum", marks=ZERO),
        pytest.param("zero_3", "averaging on NVMe", "the masters are swapped out", marks=ZERO),
    ],
)
def test_refused_before_the_first_step_on_every_rank_alike(job, engine, case, words):
    first, second = job("refused", engine, case=case)
    assert first == second
    assert words in first


@ZERO
def test_lightnings_averaging_beside_deepspeeds_masters_warns_on_one_rank(job):
    assert job("averaged_beside_the_masters", "zero_1") == [True, False]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *(pytest.param(f"zero_{s}", marks=ZERO) for s in (1, 2, 3))])
def test_manual_optimisation_clips_at_each_step(job, engine):
    job("manual_optimisation_clips", engine)
