"""Every engine's checkpoint as one file, and looked into without running anything."""

import importlib.util
import os
import pickle
import shutil

import pytest
import torch

from lightning_tricks.engines import consolidate, inspect_checkpoint, read_checkpoint
from lightning_tricks.engines._skim import skim
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage import WeightsFile
from tests.conformance.engines import Group
from tests.engines import checkpoint_jobs as jobs

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]
NAMES = {"ddp": "one device or DDP", "fsdp2": "FSDP2", "zero_1": "ZeRO-1", "zero_2": "ZeRO-2", "zero_3": "ZeRO-3"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint that two ranks of an engine wrote of a module."""
    folder = tmp_path_factory.mktemp("checkpoints")
    group = Group(2, folder / "ranks", "tests.engines.checkpoint_jobs:prepare")

    def make(engine, module, precision="32-true"):
        place = folder / precision
        path = place / f"{engine}-{module}.ckpt"
        if not path.exists():
            place.mkdir(exist_ok=True)
            group.call(
                "tests.engines.checkpoint_jobs:save",
                engine=engine,
                folder=f"{place}",
                module=module,
                precision=precision,
            )
        return path

    yield make
    group.close()


def weights_in(path):
    """The weights in a checkpoint, those that ZeRO trained by DeepSpeed's own conversion."""
    state = read_checkpoint(path)["state_dict"]
    if not (path / "checkpoint").is_dir():
        return state
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    masters = get_fp32_state_dict_from_zero_checkpoint(str(path), tag="checkpoint")
    assert "head.weight" in masters
    assert set(masters) <= set(state)
    return {**state, **masters}


@pytest.mark.slow
@pytest.mark.parametrize("module", jobs.MODULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_file_that_loads_strictly(saved, tmp_path, engine, module):
    path, out, seen = saved(engine, module), tmp_path / "new" / "one.safetensors", []
    consolidate(path, out, progress=lambda done, total: seen.append((done, total)))
    file, expected = WeightsFile(out), weights_in(path)
    assert set(file.names) == set(expected)
    for name in file.names:
        assert torch.equal(file.tensor(name), expected[name]), name
    jobs.MODULES[module]().load_state_dict({name: file.tensor(name) for name in file.names}, strict=True)
    start = jobs.MODULES[module]().state_dict()
    assert any(not torch.equal(start[name], expected[name]) for name in start)
    assert seen[-1] == (seen[-1][1],) * 2
    assert len(seen) == len(file.names)
    assert [item.name for item in out.parent.iterdir()] == [out.name]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("zero_2", marks=ZERO), pytest.param("zero_3", marks=ZERO), "fsdp2"])
def test_low_precision_gives_the_fp32_masters(saved, tmp_path, engine):
    path, out = saved(engine, "tied", "bf16-mixed"), tmp_path / "one.safetensors"
    consolidate(path, out)
    file, expected = WeightsFile(out), weights_in(path)
    assert set(file.names) == set(expected)
    for name in file.names:
        assert torch.equal(file.tensor(name).to(expected[name].dtype), expected[name]), name
    assert file.layout["head.weight"][0] == torch.float32
    assert (file.tensor("head.weight") != file.tensor("head.weight").bfloat16().float()).any()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_inspected(saved, engine):
    facts = inspect_checkpoint(saved(engine, "plain"))
    assert (facts.engine, facts.ranks) == (NAMES[engine], 1 if engine == "ddp" else 2)
    assert (facts.step, facts.epoch, facts.tensors, facts.resumable) == (2, 0, 18, True)
    net = jobs.MODULES["plain"]()
    assert facts.elements == {"float32": sum(value.numel() for value in net.parameters()) + 3, "int64": 1}
    assert facts.weights_bytes < facts.disk_bytes


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_part_that_is_missing_or_cut_is_an_error_and_an_old_file_stays(saved, tmp_path, engine):
    source, out = saved(engine, "plain"), tmp_path / "one.safetensors"
    out.write_bytes(b"old")
    path = tmp_path / source.name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    parts = sorted(file for file in [path, *path.rglob("*")] if file.suffix in (".pt", ".distcp", ".ckpt"))
    parts = [file for file in parts if file.is_file() and file.name != "meta.pt"]
    largest = max(parts, key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])
    for _ in range(2):
        with pytest.raises(CheckpointError, match=path.name):
            consolidate(path, out)
        largest.unlink(missing_ok=True)
    assert out.read_bytes() == b"old"
    assert [file.name for file in tmp_path.glob("*one*")] == [out.name]


# -- without a group -----------------------------------------------------------------------------------------------


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (f"{self.folder}/trapped",)


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {"A": Trap(tmp_path)}}, tmp_path / "a.ckpt")
    assert inspect_checkpoint(tmp_path / "a.ckpt").callbacks == ["A"]
    consolidate(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert not (tmp_path / "trapped").exists()


def test_nothing_in_a_folder_is_run(tmp_path):
    (tmp_path / "a.ckpt").mkdir()
    (tmp_path / "a.ckpt" / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path)))
    for look in (inspect_checkpoint, read_checkpoint, lambda path: consolidate(path, tmp_path / "a.safetensors")):
        with pytest.raises(CheckpointError, match=r"names `posix\.mkdir`"):
            look(tmp_path / "a.ckpt")
    assert not (tmp_path / "trapped").exists()


def test_tensors_as_torch_reads_them(tmp_path):
    grid = torch.arange(24.0).view(4, 6)
    content = {
        "part": grid[1:3, ::2],
        "turned": grid.T,
        "one": torch.tensor(7),
        "none": torch.empty(0, 3),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "flags": torch.tensor([True, False]),
    }
    torch.save(content, tmp_path / "some.pt")
    expected, found = torch.load(tmp_path / "some.pt"), skim(tmp_path / "some.pt")
    for name, value in expected.items():
        tensor = found[name].tensor()
        assert (tensor.dtype, tensor.shape) == (value.dtype, value.shape), name
        assert torch.equal(tensor.float(), value.detach().float()), name


def test_an_adapters_file_tells_how_much_of_the_base_it_leaves_out(tmp_path):
    record = {"base": {"enter.weight": "a1", "enter.bias": "b2"}}
    torch.save({"state_dict": {"w": torch.ones(2)}, "lightning_tricks": record, "loops": {}}, tmp_path / "a.ckpt")
    facts = inspect_checkpoint(tmp_path / "a.ckpt")
    assert (facts.base_tensors, facts.resumable, facts.step) == (2, False, None)


@pytest.mark.parametrize("name", ["out.pt", "plain.safetensors"])
def test_a_target_that_cannot_be_meant(tmp_path, name):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "plain.ckpt")
    consolidate(tmp_path / "plain.ckpt", tmp_path / "plain.safetensors")
    with pytest.raises(MisconfigurationError, match=name):
        consolidate(tmp_path / "plain.safetensors", tmp_path / name)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "note.ckpt").write_text("no")
    torch.save({"w": torch.ones(1)}, tmp_path / "bare.ckpt")
    torch.save({"state_dict": {"extra": "state"}}, tmp_path / "extra.ckpt")
    messages = {
        "none.ckpt": "there is no",
        "note.ckpt": "truncated",
        "bare.ckpt": "state_dict",
        "extra.ckpt": "`extra`",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            consolidate(tmp_path / name, tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="neither ZeRO nor FSDP2"):
        inspect_checkpoint(tmp_path)
