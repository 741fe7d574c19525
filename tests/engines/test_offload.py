"""Offload to the host's memory: what the engines' checks ask, on two processes, with `zero_2_offload` and its like."""

import pytest

from tests.engines import checks
from tests.engines.check_runs import Checks

FLAGS = ["fsdp2_offload", "zero_2_offload", "zero_3_offload"]
CHECKS = ["twenty_steps", "accumulation", "clipping", "scaled_gradients", "weights_file", "weights_file_bf16", "resume"]
CHECKS += ["frozen", "vetoed"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Checks(tmp_path_factory.mktemp("offload"))
    yield made
    made.close()


def test_the_checks_exist():
    assert [check for check in CHECKS if not hasattr(checks, check)] == []


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("flag", FLAGS)
def test_check(runs, flag, check):
    runs.run(flag, check)
