"""What an engine reports about itself, on two real processes: equal to what is allocated and computed."""

import importlib.util

import pytest

from tests.conformance.engines import Group
from tests.engines import describe_jobs as jobs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
FULL = ["fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]
PAIRS = [
    pytest.param(engine, precision, marks=[ZERO] * engine.startswith("zero"))
    for precision, engines in jobs.EXPECTED.items()
    for engine in engines
    if engine != "one_device"
]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("describe")
    group = Group(2, folder / "ranks", "tests.engines.describe_jobs:prepare")
    yield lambda name, engine, **arguments: group.call(
        f"tests.engines.describe_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    group.close()


@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_bytes_are_those_allocated(job, engine, precision):
    job("allocated", engine, precision=precision)


@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_dtypes_are_the_actual_ones(job, engine, precision):
    job("dtypes", engine, precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_dtypes_of_lightnings_own_strategies(job, engine, precision):
    job("dtypes", engine, precision=precision, own=True)


@pytest.mark.parametrize("engine", FULL)
def test_the_log_has_one_line(job, engine):
    job("said", engine)


@pytest.mark.parametrize("precision", jobs.EXPECTED)
def test_one_device(tmp_path, precision):
    jobs.allocated("one_device", f"{tmp_path}", precision)
