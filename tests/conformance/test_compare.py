"""What counts as a difference between two outcomes."""

import pytest
import torch

from tests.conformance.compare import differences

ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("found", "wanted", "tolerance"),
    [
        (ONES + 1e-6, ONES, 1e-5),
        (ONES, ONES.clone(), 0.0),
        (torch.zeros(2), torch.zeros(2), 0.0),
        ({"a": [1, "x", 0.5]}, {"a": [1, "x", 0.5]}, 0.0),
        (1.0000001, 1.0, 1e-6),
    ],
)
def test_equal(found, wanted, tolerance):
    assert list(differences(found, wanted, tolerance)) == []


@pytest.mark.parametrize(
    ("found", "wanted", "tolerance", "message"),
    [
        (ONES + 1e-4, ONES, 1e-5, "off by 0.0001 of its largest value"),
        (ONES + 1e-6, ONES, 0.0, "not equal in every bit"),
        (ONES * float("nan"), ONES, 1e-1, "off by nan"),
        (ONES, torch.zeros(3), 1e-1, "off by inf"),
        (ONES, ONES.double(), 1e-1, "torch.float32"),
        (ONES, torch.ones(2), 1e-1, r"\[3\], not torch.float32 \[2\]"),
        (torch.tensor([5]), torch.tensor([6]), 1.0, "not equal"),
        (7, 8, 1.0, "is 7, not 8"),
        ("a", None, 1.0, "is 'a', not None"),
        ([1], [1, 2], 1.0, "is "),
        ({"a": 1}, {"a": 1, "b": 2}, 1.0, r"is \['a'\], not \['a', 'b'\]"),
        (1.1, 1.0, 1e-2, "off by 0.1"),
    ],
)
def test_different(found, wanted, tolerance, message):
    with pytest.raises(AssertionError, match=message):
        assert not (lines := list(differences(found, wanted, tolerance))), lines[0]


def test_the_place_is_named():
    (line,) = differences({"weights": {"a": ONES, "b": ONES}}, {"weights": {"a": ONES, "b": ONES + 1}}, 0.1)
    assert line.startswith("['weights']['b'] ")
