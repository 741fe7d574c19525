"""Swapping to NVMe: what the machine lacks is said by every rank; what it needs to run, it seldom has."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_tricks.engines import _nvme
from lightning_tricks.engines._nvme import nvme_problem
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.strategies import zero
from tests.conformance.engines import Group

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed"),
]


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("LIGHTNING_TRICKS_NVME", raising=False)


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """A machine on which everything builds: `true` is its compiler, and there is a ninja."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("true", "ninja"):
        (tools / name).write_text("#!/bin/sh\nexit 0\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}")
    monkeypatch.setenv("CXX", "true")
    return tools


def test_a_folder_is_writable_or_named(tmp_path, builds):
    assert nvme_problem(tmp_path) is None
    assert f"The folder {tmp_path}/none to swap to does not exist: create it" in str(nvme_problem(tmp_path / "none"))
    file = tmp_path / "file"
    file.touch()
    assert f"The folder {file} to swap to is no folder" in str(nvme_problem(file))
    problem = nvme_problem(Path("/proc"))  # a folder where not even root may create a file
    assert isinstance(problem, MisconfigurationError)
    assert "The folder /proc to swap to cannot be written to (" in str(problem)


def test_what_the_build_needs_is_named(tmp_path, builds, monkeypatch):
    (builds / "ninja").rename(builds / "other")
    assert "there is no `ninja` on PATH" in str(nvme_problem(tmp_path))
    monkeypatch.setattr(_nvme.importlib.util, "find_spec", lambda name: None)
    assert str(nvme_problem(tmp_path)).endswith("on PATH: pip install ninja")
    (builds / "other").rename(builds / "ninja")
    (builds / "true").write_text("#!/bin/sh\nexit 1\n")
    assert str(nvme_problem(tmp_path)).endswith("apt-get install libaio-dev")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_nvme, "_cuda_home", lambda: None)
    assert "apt-get install nvidia-cuda-toolkit" in str(nvme_problem(tmp_path))
    monkeypatch.setenv("CXX", "none++ -O2")
    assert str(nvme_problem(tmp_path)).endswith("no C++ compiler `none++`: apt-get install g++")


def test_a_built_reader_needs_no_compiler(tmp_path, builds, monkeypatch):
    from deepspeed.git_version_info import installed_ops

    monkeypatch.setenv("CXX", "none++")
    monkeypatch.setitem(installed_ops, "async_io", True)
    assert nvme_problem(tmp_path) is None


def test_nvme_is_a_folder_from_the_environment(monkeypatch, tmp_path):
    with pytest.raises(MisconfigurationError, match="set the environment variable LIGHTNING_TRICKS_NVME"):
        zero(stage=3, offload="nvme")
    monkeypatch.setenv("LIGHTNING_TRICKS_NVME", f"{tmp_path}")
    for offload in ("nvme", tmp_path, f"{tmp_path}"):
        section = zero(stage=3, offload=offload).config["zero_optimization"]
        for part in ("offload_param", "offload_optimizer"):
            assert (section[part]["device"], section[part]["nvme_path"]) == ("nvme", f"{tmp_path}")


@pytest.mark.parametrize("stage", [1, 2])
def test_only_stage_three_swaps(stage):
    with pytest.raises(MisconfigurationError, match=f"`offload` is '/mnt', and .* at stage 3 only, got stage {stage}"):
        zero(stage=stage, offload=Path("/mnt"))
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "nvme", "nvme_path": "/mnt"}}}
    with pytest.raises(MisconfigurationError, match=r"sets `offload_optimizer.device` to 'nvme', and .* at stage 3"):
        zero(config=config)


@pytest.mark.parametrize("offload", ["gpu", True, 3])
def test_a_misspelt_offload_is_no_folder(offload):
    with pytest.raises(MisconfigurationError, match="`offload` must be 'cpu', 'nvme', a folder"):
        zero(stage=3, offload=offload)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("nvme")
    group = Group(2, folder / "ranks", "tests.engines.nvme_jobs:prepare")
    yield lambda name, **options: group.call(f"tests.engines.nvme_jobs:{name}", folder=f"{folder}", **options)
    group.close()


@pytest.mark.slow
def test_a_machine_that_cannot_swap_is_refused_on_every_rank(job):
    job("refused")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_swapped_is_the_same(job, tmp_path):
    """Where the machine can: the first run builds a part of DeepSpeed, which takes minutes."""
    if (problem := nvme_problem(tmp_path)) is not None:
        pytest.skip(f"not run: {problem}")
    job("swapped", stand_in=False, limit=400.0)


@pytest.mark.slow
def test_swapped_is_the_same_without_libaio(job):
    """DeepSpeed's swapping is real here, except that Python reads and writes its files."""
    job("swapped", stand_in=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no_checkpoints", "built_late"])
def test_without_libaio(job, name):
    job(name)
