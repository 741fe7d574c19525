"""NonFiniteGuard on every engine, with two real processes: traps C1 to C4."""

import importlib.util

import pytest

from tests.callbacks import guard_jobs as jobs
from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("guard")
    group = Group(2, folder / "ranks", "tests.callbacks.guard_jobs:prepare")
    yield lambda name, engine, **arguments: group.call(
        f"tests.callbacks.guard_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    group.close()


@pytest.mark.parametrize("kind", jobs.KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_c1_c3_c4_a_window_that_is_bad_on_one_rank_is_as_if_it_had_not_been(job, engine, kind):
    job("window_as_if_it_had_not_been", engine, kind=kind, precision="32-true")


@pytest.mark.parametrize("engine", ENGINES)
def test_c1_in_low_precision(job, engine):
    job("window_as_if_it_had_not_been", engine, kind="loss", precision="bf16-mixed")


@pytest.mark.parametrize("engine", ENGINES)
def test_c4_too_many_in_a_row_end_the_fit_on_every_rank(job, engine):
    job("stops", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_c2_overflows_are_left_to_the_loss_scaler(job, engine):
    job("scaled", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_c3_skipped_steps_are_logged(job, engine):
    job("logged", engine)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero_3", marks=ZERO)])
def test_one_bad_batch_in_a_thousand(job, engine):
    job("one_batch_in_a_thousand", engine, limit=240)
