"""LayerwiseUnfreezing on every engine, with two real processes: as in plain torch, and through an interruption."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
STAGES = [pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3)]
OFFLOAD = [pytest.param(f"zero_{stage}_offload", marks=ZERO) for stage in (2, 3)]
ENGINES = ["ddp", "fsdp2", "fsdp2_offload", *STAGES, *OFFLOAD]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("unfreezing")
    group = Group(2, folder / "ranks", "tests.callbacks.unfreezing_jobs:prepare")
    yield lambda name, engine, **arguments: group.call(
        f"tests.callbacks.unfreezing_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    group.close()


@pytest.mark.parametrize("engine", [*ENGINES, "fsdp1"])
def test_as_in_plain_torch(job, engine):
    job("as_in_plain_torch", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupted(job, engine):
    job("interrupted", engine)


@pytest.mark.parametrize("engine", ["fsdp2", *STAGES])
def test_interrupted_in_low_precision(job, engine):
    job("interrupted", engine, precision="bf16-mixed")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *STAGES])
def test_under_a_loss_scale(job, engine):
    job("scaled", engine)


@pytest.mark.parametrize("engine", ["fsdp2", *STAGES])
def test_by_steps(job, engine):
    job("by_steps", engine)


@pytest.mark.parametrize("engine", STAGES)
def test_a_part_of_a_group_is_refused(job, engine):
    job("part_of_a_group", engine)


def test_a_file_with_half_a_state_is_refused(job):
    job("half_a_state", "fsdp2")


@pytest.mark.parametrize("engine", STAGES)
def test_half_a_state_is_for_as_many_ranks(job, engine):
    job("other_ranks", engine)
