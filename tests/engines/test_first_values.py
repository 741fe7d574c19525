"""Where a model's first values come from, on two real processes: rank 0, ties, the meta device."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

JOBS = "tests.engines.first_value_jobs"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", "hsdp", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (2, 3))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one device has left its references."""
    folder = tmp_path_factory.mktemp("first")
    group = Group(1, folder / "one", f"{JOBS}:prepare")
    for late in (False, True):
        group.call(f"{JOBS}:tied", engine="one_device", folder=f"{folder}", late=late)
    group.close()
    return folder


@pytest.fixture(scope="module")
def job(folder):
    """Run a job on two ranks."""
    group = Group(2, folder / "ranks", f"{JOBS}:prepare")
    yield lambda name, **arguments: group.call(f"{JOBS}:{name}", folder=f"{folder}", **arguments)
    group.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_values_are_those_of_rank_zero(job, engine, late):
    job("from_rank_zero", engine=engine, late=late)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_tied_weights_stay_tied(job, engine, late):
    job("tied", engine=engine, late=late)


@pytest.mark.parametrize(("engine", "offload"), [("fsdp2", None), ("fsdp2", "cpu"), ("hsdp", None)])
def test_a_module_on_the_meta_device_gets_the_values_of_one_device(job, engine, offload):
    job("from_meta", engine=engine, offload=offload)


def test_no_rank_holds_the_whole_model_while_it_is_made(job):
    job("never_whole")


def test_a_layer_without_first_values_is_refused(job):
    job("meta_refused")
