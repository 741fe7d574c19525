"""Clipping of units, elements and parts on every engine, with two real processes, against plain torch in one."""

import importlib.util

import pytest

from tests.conformance.engines import Group
from tests.engines import part_clipping_jobs as jobs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
STAGES = [pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3)]
OFFLOAD = [pytest.param(f"zero_{stage}_offload", marks=ZERO) for stage in (2, 3)]
ENGINES = ["ddp", "fsdp2", "fsdp1", *STAGES]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("parts")
    group = Group(2, folder / "ranks", "tests.engines.part_clipping_jobs:prepare")
    yield lambda name, engine, **arguments: group.call(
        f"tests.engines.part_clipping_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    group.close()


@pytest.mark.parametrize("policy", jobs.POLICIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_is_plain_torchs(job, engine, policy):
    first, second = job("clipped_as_in_plain_torch", engine, policy=policy)
    assert first == second, "the ranks log differently"
    assert max(first) > 0


@pytest.mark.parametrize("policy", ["unit", "value"])
@pytest.mark.parametrize("engine", ["fsdp2_offload", *OFFLOAD])
def test_offloaded_gradients_are_clipped_likewise(job, engine, policy):
    job("clipped_as_in_plain_torch", engine, policy=policy)


@pytest.mark.parametrize("policy", jobs.POLICIES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *STAGES])
def test_scaled_gradients_are_clipped_unscaled(job, engine, policy):
    job("clipped_as_in_plain_torch", engine, policy=policy, scaled=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_unit_that_is_not_finite_spoils_no_other(job, engine):
    job("bad_units_spoil_no_other", engine)
