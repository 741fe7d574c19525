"""CheckpointEnsemble of a module with running statistics on every engine, with two real processes."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("ensembles")
    group = Group(2, folder / "ranks", "tests.callbacks.ensemble_statistics_jobs:prepare")
    yield lambda name, engine: group.call(
        f"tests.callbacks.ensemble_statistics_jobs:{name}", engine=engine, folder=f"{folder}"
    )
    group.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_average_has_statistics_of_its_own(job, engine):
    job("statistics", engine)
