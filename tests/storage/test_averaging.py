"""The average of weights files: exact, streaming, and strict about what it averages."""

import weakref

import pytest
import torch

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage import WeightsFile, average_weights, write_weights


@pytest.fixture
def save(tmp_path):
    def write(name, **tensors):
        path = tmp_path / f"{name}.safetensors"
        write_weights(path, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, tensors.items())
        return path

    return write


def averaged(tmp_path, members, **options):
    average_weights(members, tmp_path / "mean", **options)
    return WeightsFile(tmp_path / "mean")


def test_is_the_mean(tmp_path, save):
    values = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    file = averaged(tmp_path, [save(str(i), w=value) for i, value in enumerate(values)], metadata={"members": "5"})
    torch.testing.assert_close(file.tensor("w"), values.double().mean(0).float(), rtol=0, atol=0)
    assert file.metadata == {"members": "5"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_equal_members_give_themselves_back(tmp_path, save, dtype):
    value = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype)
    file = averaged(tmp_path, [save(str(i), w=value) for i in range(3)])
    assert file.tensor("w").dtype == dtype
    assert torch.equal(file.tensor("w"), value)


def test_half_precision_is_summed_in_full(tmp_path, save):
    members = [save(str(i), w=torch.tensor([60000.0], dtype=torch.float16)) for i in range(4)]
    assert averaged(tmp_path, members).tensor("w").item() == 60000.0


def test_integers_and_masks_come_from_the_last(tmp_path, save):
    members = [save(str(i), count=torch.tensor(i), mask=torch.tensor([i == 2])) for i in range(3)]
    file = averaged(tmp_path, members)
    assert file.tensor("count").dtype == torch.int64
    assert (file.tensor("count").item(), file.tensor("mask").item()) == (2, True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.ones(2)}, r"`b` is absent in the one and float32 of shape \[3\] in the other"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "`c` is float32 of shape"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"`b` is float32 of shape \[4\] in the one"),
        ({"a": torch.ones(2), "b": torch.ones(3).half()}, "`b` is float16"),
    ],
)
def test_a_mismatch_names_the_first_that_differs(tmp_path, save, other, message):
    members = [save("one", a=torch.ones(2), b=torch.ones(3)), save("two", **other)]
    with pytest.raises(CheckpointError, match=message):
        averaged(tmp_path, members)
    assert not (tmp_path / "mean").exists()


def test_a_truncated_member_is_named(tmp_path, save):
    path = save("cut", w=torch.ones(100))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        averaged(tmp_path, [save("good", w=torch.ones(100)), path])


def test_no_member_is_an_error(tmp_path):
    with pytest.raises(MisconfigurationError, match="at least one"):
        average_weights([], tmp_path / "mean")


def test_memory_does_not_grow_with_the_members(tmp_path, save, monkeypatch):
    alive, most = set(), 0
    read = WeightsFile.tensor

    def counted(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.add(id(tensor))
        most = max(most, len(alive))
        weakref.finalize(tensor, alive.discard, id(tensor))
        return tensor

    monkeypatch.setattr(WeightsFile, "tensor", counted)
    names = "abcdefgh"
    averaged(tmp_path, [save(str(i), **{n: torch.ones(4) for n in names}) for i in range(9)])
    assert most <= 2
