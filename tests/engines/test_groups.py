"""Every check of `checks.py` on every engine: one device first, which writes the references, then two processes."""

import inspect

import pytest

from tests.engines import checks
from tests.engines.group import run_group

GROUPS = [["one_device"], ["ddp", "fsdp2"], ["zero_1", "zero_2", "zero_3"]]
CHECKS = [
    name
    for name, function in vars(checks).items()
    if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["run"]
]

PAIRS = [
    (engine, check)
    for group in GROUPS
    for engine in group
    for check in CHECKS
    if engine in checks.ONLY.get(check, (engine,))
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    results = {}
    for group in GROUPS:
        processes = 1 if group == ["one_device"] else 2
        results |= run_group([pair for pair in PAIRS if pair[0] in group], folder, processes, seconds=240)
    return results


def test_there_are_checks():
    assert {"twenty_steps", "accumulation", "clipping", "weights_file", "resume", "read", "frozen"} <= set(CHECKS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("engine", "check"), PAIRS)
def test_check(verdicts, engine, check):
    assert verdicts[engine, check] == "passed", verdicts[engine, check]
