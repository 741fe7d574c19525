"""Fingerprints tell tensors apart, but not the same tensor at two precisions."""

import zlib

import pytest
import torch

from lightning_tricks.functional import fingerprint, same_fingerprint


def test_holds_the_checksum_of_the_bytes():
    tensor = torch.randn(3, 4)
    found = fingerprint(tensor)
    assert found["shape"] == "3x4"
    assert found["float32"] == f"{zlib.crc32(tensor.numpy().tobytes()):08x}"


def test_does_not_depend_on_the_layout_in_memory():
    tensor = torch.randn(3, 4)
    assert fingerprint(tensor.t().contiguous().t()) == fingerprint(tensor)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4)])
def test_every_tensor_has_one(dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    assert same_fingerprint(fingerprint(tensor), fingerprint(tensor.clone()))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_the_same_weights(narrow):
    tensor = torch.randn(100)
    assert same_fingerprint(fingerprint(tensor), fingerprint(tensor.to(narrow)))
    assert same_fingerprint(fingerprint(tensor.to(narrow)), fingerprint(tensor))


def test_the_smallest_change_is_seen():
    tensor = torch.randn(100)
    changed = tensor.clone()
    changed[7] = torch.nextafter(changed[7], torch.tensor(torch.inf))
    assert not same_fingerprint(fingerprint(tensor), fingerprint(changed))


@pytest.mark.parametrize(
    "other", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.uint8)], ids=["another shape", "no common precision"]
)
def test_others_are_told_apart(other):
    assert not same_fingerprint(fingerprint(torch.zeros(3, 2)), fingerprint(other))
