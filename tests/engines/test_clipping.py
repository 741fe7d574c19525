"""Adaptive clipping on sharded engines, each on two real processes: infinite limits, and a spike after a bad step."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (2, 3))]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("clipping")
    group = Group(2, folder / "ranks", "tests.engines.clipping_jobs:prepare")
    yield lambda name, engine: group.call(f"tests.engines.clipping_jobs:{name}", engine=engine, folder=f"{folder}")
    group.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_spike_after_a_bad_step_is_clipped(job, engine):
    first, second = job("spike_after_nan", engine)
    assert first == second, "the ranks decided differently"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_limit_changes_nothing(job, engine):
    job("unlimited", engine)
