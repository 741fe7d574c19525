"""A DeepSpeed configuration of the user's own, and modules that ZeRO cannot train: on two real processes."""

import importlib.util

import pytest

from tests.conformance.engines import Group

ZERO = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed")
STAGES = [pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3)]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("config")
    group = Group(2, folder / "ranks", "tests.engines.config_jobs:prepare")
    yield lambda name, **arguments: group.call(f"tests.engines.config_jobs:{name}", folder=f"{folder}", **arguments)
    group.close()


@ZERO
@pytest.mark.parametrize("name", ["reaches_deepspeed", "precision", "own_optimizer", "conflicts", "clipping"])
def test_configuration(job, name):
    job(name)


@pytest.mark.parametrize("engine", STAGES)
@pytest.mark.parametrize("name", ["refused_optimizers", "changed_late"])
def test_refused_before_the_first_step(job, name, engine):
    job(name, engine=engine)


@pytest.mark.parametrize("engine", ["fsdp2", *STAGES])
def test_a_module_without_anything_to_train(job, engine):
    job("nothing_to_train", engine=engine)
