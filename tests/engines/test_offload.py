"""Offload to the host's memory: what the engines' checks ask, on two processes, with `zero_2_offload` and its like."""

import pytest

from tests.engines import checks
from tests.engines.group import run_group

FLAGS = ["fsdp2_offload", "zero_2_offload", "zero_3_offload"]
CHECKS = ["twenty_steps", "accumulation", "clipping", "scaled_gradients", "weights_file", "weights_file_bf16", "resume"]
CHECKS += ["frozen", "vetoed"]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    results = run_group([("one_device", check) for check in CHECKS], folder, 1, seconds=120)
    return results | run_group([(flag, check) for flag in FLAGS for check in CHECKS], folder, 2, seconds=240)


def test_the_checks_exist():
    assert [check for check in CHECKS if not hasattr(checks, check)] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("flag", FLAGS)
def test_check(verdicts, flag, check):
    assert verdicts[flag, check] == "passed", verdicts[flag, check]
