"""SpikeRecovery on every engine, with two real processes: bit for bit the fit without the batches."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
STAGES = [pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3)]
OFFLOAD = [pytest.param(f"zero_{stage}_offload", marks=ZERO) for stage in (2, 3)]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("spikes")
    group = Group(2, folder / "ranks", "tests.callbacks.spike_jobs:prepare")
    yield lambda name, engine, **arguments: group.call(
        f"tests.callbacks.spike_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    group.close()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp", "fsdp2_offload", *STAGES, *OFFLOAD])
def test_as_if_the_batches_had_not_been(job, engine):
    job("as_if_the_batches_had_not_been", engine)


@pytest.mark.parametrize("engine", ["fsdp2", *STAGES])
def test_in_low_precision(job, engine):
    job("as_if_the_batches_had_not_been", engine, precision="bf16-mixed")


@pytest.mark.parametrize("engine", ["ddp", *STAGES])
def test_with_a_scaler(job, engine):
    job("as_if_the_batches_had_not_been", engine, precision="16-mixed")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *STAGES])
def test_back_to_the_start(job, engine):
    job("back_to_the_start", engine)
