"""Every check of `checks.py` on every engine: one device first, which writes the references, then two processes."""

import inspect

import pytest

from tests.engines import checks
from tests.engines.group import run_group

GROUPS = [["one_device"], ["ddp", "fsdp2"], ["zero_1", "zero_2", "zero_3"]]
ENGINES = [engine for group in GROUPS for engine in group]
CHECKS = [
    name
    for name, function in vars(checks).items()
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["run"]
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    results = {}
    for group in GROUPS:
        processes = 1 if group == ["one_device"] else 2
        results |= run_group(group, folder, CHECKS, processes, seconds=240)
    return results


def test_there_are_checks():
    assert {"twenty_steps", "accumulation", "clipping", "weights_file", "resume", "read", "frozen"} <= set(CHECKS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("check", CHECKS)
def test_check(verdicts, engine, check):
    assert verdicts[engine, check] == "passed", verdicts[engine, check]
