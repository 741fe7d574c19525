"""The matrix finds what is wrong: tricks that are right on one device, and wrong elsewhere or after a resume."""

import pytest

from tests.conformance.broken_cases import CASES
from tests.conformance.matrix import Matrix

LOCAL_MEAN, LOCAL_CLIPPING, FORGETFUL, REFUSED = CASES
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    matrix = Matrix("tests.conformance.broken_cases", tmp_path_factory.mktemp("broken"))
    yield matrix
    matrix.close()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("case", [LOCAL_MEAN, LOCAL_CLIPPING], ids=lambda case: case.name)
def test_a_trick_that_looks_at_its_own_rank_only(matrix, case, precision):
    off = matrix.deviations(case, "fsdp2", precision)
    assert any(line.startswith("against one device: ['weights']") for line in off)
    assert not any(line.startswith("resumed") for line in off)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_trick_that_forgets_its_state(matrix, precision):
    off = matrix.deviations(FORGETFUL, "fsdp2", precision)
    assert any(line.startswith("resumed against uninterrupted: ['weights']") for line in off)
    assert not any(line.startswith("against one device") for line in off)


def test_a_refusal(matrix):
    assert matrix.fit(REFUSED, "one_device", "32-true")[0] == {}
    reply, _ = matrix.fit(REFUSED, "fsdp2", "32-true")
    assert reply["message"] == "Refused cannot run on fsdp2: it needs one device. Instead, use one."
    assert reply["reason"] == "it needs one device"
