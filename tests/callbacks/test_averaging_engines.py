"""WeightAveraging on every engine, with two real processes: traps D and E6."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("averaging")


@pytest.fixture(scope="module")
def group(folder):
    """A function that runs a job on that many ranks; a failure shows the traceback of each."""
    groups = {
        world: Group(world, folder / f"ranks{world}", "tests.callbacks.averaging_jobs:prepare") for world in (1, 2)
    }
    yield lambda world, name, engine: groups[world].call(
        f"tests.callbacks.averaging_jobs:{name}", engine=engine, folder=f"{folder}"
    )
    for each in groups.values():
        each.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_d12_equals_the_one_process_average_on_one_copy_of_the_shards(group, engine):
    group(2, "averages", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_d1_d2_d11_files_and_resuming(group, engine):
    group(2, "saves", engine)
    if engine != "ddp":  # the very file: whole, whatever the number of ranks
        group(1, "reads_on_another_number", engine)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero_3", marks=ZERO)])
def test_offloaded_is_the_same_in_every_bit(group, engine):
    group(2, "offloads", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_d3_an_exception_in_a_validation(group, engine):
    group(2, "broken_everywhere", engine)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero_2", marks=ZERO)])
def test_d3_an_exception_on_one_rank_waits_for_no_other(group, engine):
    group(2, "broken_on_one_rank", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_d9_running_statistics(group, engine):
    group(2, "statistics", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_e6_the_best_weights_are_averaged_ones(group, engine):
    group(2, "with_early_stopping", engine)
