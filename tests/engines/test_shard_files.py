"""Values kept beside the master shards, saved on one number of ranks and loaded on another, by any engine."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]
JOBS = "tests.engines.shard_file_jobs"


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """A group of one process, and one of two."""
    folder = tmp_path_factory.mktemp("shards")
    made = {world: Group(world, folder / f"{world}", f"{JOBS}:prepare") for world in (1, 2)}
    yield made
    for group in made.values():
        group.close()


@pytest.mark.parametrize("saved", [2, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_saved_and_loaded_on_any_number_of_ranks(groups, tmp_path, engine, saved):
    groups[saved].call(f"{JOBS}:save", engine=engine, folder=f"{tmp_path}")
    for loaded in (saved, 3 - saved):
        groups[loaded].call(f"{JOBS}:load", engine=engine, folder=f"{tmp_path}")


@ZERO
@pytest.mark.parametrize(("saved", "loaded"), [("zero_3", "fsdp2"), ("fsdp2", "zero_1"), ("ddp", "zero_3")])
def test_saved_by_one_engine_and_loaded_by_another(groups, tmp_path, saved, loaded):
    groups[2].call(f"{JOBS}:save", engine=saved, folder=f"{tmp_path}")
    groups[2].call(f"{JOBS}:load", engine=loaded, folder=f"{tmp_path}")


@pytest.mark.parametrize("engine", ENGINES)
def test_faults_are_raised_on_every_rank_and_an_old_file_stays(groups, tmp_path, engine):
    groups[2].call(f"{JOBS}:faults", engine=engine, folder=f"{tmp_path}")


def test_another_modules_file_is_refused(groups, tmp_path):
    groups[2].call(f"{JOBS}:save", engine="fsdp2", folder=f"{tmp_path}")
    groups[2].call(f"{JOBS}:other_module", engine="fsdp2", folder=f"{tmp_path}")
