import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage import WeightsFile, write_weights

TENSORS = {
    "fp32": torch.randn(5, 3, 2),
    "bf16": torch.randn(4, 4).bfloat16(),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False, True]),
    "double": torch.randn(3, dtype=torch.float64),
    "transposed": torch.randn(3, 4).t(),
    "odd": torch.randn(5).half(),
}


def layout_of(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path, tensors, metadata=None):
    write_weights(path, layout_of(tensors), iter(tensors.items()), metadata)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "weights.safetensors"


def test_safetensors_reads_what_is_written(path):
    write(path, TENSORS, {"step": "3"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "3"}


def test_reads_what_safetensors_writes(path):
    path.parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, path, {"a": "b"})
    file = WeightsFile(path)
    assert set(file.names) == set(TENSORS)
    assert file.metadata == {"a": "b"}
    assert file.layout == {name: layout_of(TENSORS)[name] for name in file.names}
    assert all(torch.equal(file.tensor(name), tensor) for name, tensor in TENSORS.items())


def test_rows_and_elements(path):
    write(path, TENSORS)
    file = WeightsFile(path)
    assert torch.equal(file.rows("fp32", 1, 4), TENSORS["fp32"][1:4])
    assert torch.equal(file.rows("transposed", 2, 2), TENSORS["transposed"][2:2])
    assert torch.equal(file.elements("fp32", 7, 29), TENSORS["fp32"].flatten()[7:29])
    assert torch.equal(file.elements("scalar", 0, 1), TENSORS["scalar"][None])
    with pytest.raises(IndexError, match="rows 1 to 6"):
        file.rows("fp32", 1, 6)
    with pytest.raises(IndexError, match="elements 0 to 31"):
        file.elements("fp32", 0, 31)


def test_order_is_the_layouts(path):
    write(path, {"b": torch.ones(1), "a": torch.zeros(2)})
    assert WeightsFile(path).names == ["b", "a"]


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_truncated_file_is_refused(path, keep):
    write(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        WeightsFile(path)


def test_other_bytes_are_refused(path):
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 this is a zip, not safetensors" * 10)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        WeightsFile(path)


def test_missing_file_and_missing_name(path):
    with pytest.raises(CheckpointError, match="no weights file"):
        WeightsFile(path)
    write(path, TENSORS)
    with pytest.raises(CheckpointError, match="no tensor `absent`"):
        WeightsFile(path).tensor("absent")


def failing_entries():
    yield "a", torch.ones(2)
    raise RuntimeError("the disk is full")


def test_failure_leaves_the_old_file(path):
    write(path, {"a": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="disk is full"):
        write_weights(path, {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}, failing_entries())
    assert torch.equal(WeightsFile(path).tensor("a"), torch.zeros(2))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("b", torch.ones(2))], "layout expects"),
        ([("a", torch.ones(3))], "layout expects"),
        ([("a", torch.ones(2).half())], "layout expects"),
        ([], "end before `a`"),
        ([("a", torch.ones(2)), ("c", torch.ones(2))], "layout expects None"),
    ],
)
def test_entries_must_fit_the_layout(path, entries, message):
    with pytest.raises(MisconfigurationError, match=message):
        write_weights(path, {"a": (torch.float32, (2,))}, entries)
    assert not path.exists()


def test_dtype_without_a_place(path):
    with pytest.raises(MisconfigurationError, match=r"complex128.*convert"):
        write_weights(path, {"a": (torch.complex128, (1,))}, [])
