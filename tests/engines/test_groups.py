"""Every check of `checks.py` on every engine: one device, which writes the references, and two processes."""

import inspect

import pytest

from tests.engines import checks
from tests.engines.check_runs import Checks

ENGINES = ["one_device", "ddp", "fsdp2", "zero_1", "zero_2", "zero_3"]
CHECKS = [
    name
    for name, function in vars(checks).items()
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["run"]
]
PAIRS = [(engine, check) for engine in ENGINES for check in CHECKS if engine in checks.ONLY.get(check, (engine,))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Checks(tmp_path_factory.mktemp("engines"))
    yield made
    made.close()


def test_there_are_checks():
    assert {"twenty_steps", "accumulation", "clipping", "weights_file", "resume", "read", "frozen"} <= set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "check"), PAIRS)
def test_check(runs, engine, check):
    runs.run(engine, check)
