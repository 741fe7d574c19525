"""What is refused before training, each with the value and the remedy."""

import re

import pytest
import torch

from lightning_tricks.cli import checks
from lightning_tricks.errors import CheckpointError, MisconfigurationError


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp2", "zero_1", "zero_2", "zero_3"])
def test_known_strategies_pass(name):
    checks.check_strategy(name)


def test_strategy_without_a_near_name_lists_ours():
    with pytest.raises(MisconfigurationError, match=r"`horovod` is not a strategy\. The flags .*`zero_3`"):
        checks.check_strategy("horovod")


def test_strategy_given_as_an_object_is_left_alone():
    checks.check_strategy({"class_path": "lightning_tricks.strategies.zero"})


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(checks, "_cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("devices", [1, 2, "2", "auto", [0, 1], -1])
def test_enough_devices_pass(two_cores, devices):
    checks.check_devices("auto", devices)


@pytest.mark.parametrize("devices", [3, "3"])
def test_more_processes_than_cores(two_cores, devices):
    with pytest.raises(MisconfigurationError, match=r"`devices=3` asks for 3 processes.*2 CPU cores.*--devices 2"):
        checks.check_devices("cpu", devices)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    checks.check_devices("auto", 2)
    with pytest.raises(MisconfigurationError, match=r"`devices=4` asks for 4 GPUs.*has 2.*`--devices 2` or fewer"):
        checks.check_devices("auto", 4)


def test_gpu_where_there_is_none(two_cores):
    with pytest.raises(
        MisconfigurationError, match=r"asks for 1 GPU, but this machine has 0.*--trainer.accelerator cpu"
    ):
        checks.check_devices("cuda", 1)


def test_folder_is_made(tmp_path):
    checks.check_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "runs"
    with pytest.raises(MisconfigurationError, match=rf"`{re.escape(str(folder))}` cannot be written.*default_root_dir"):
        checks.check_folder(folder)


def test_folder_without_permission(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)  # the test may run as root
    with pytest.raises(MisconfigurationError, match=r"cannot be written \(Permission denied\)"):
        checks.check_folder(tmp_path)


def test_checkpoint_that_is_cut_off(tmp_path):
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, whole)
    checks.check_checkpoint(whole)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt` is incomplete.*--resume"):
        checks.check_checkpoint(cut)
