"""`consolidate` and `inspect`."""

import errno
import os

import pytest
import torch

from lightning_tricks.cli import main
from lightning_tricks.storage import WeightsFile


@pytest.fixture
def checkpoint(tmp_path):
    callbacks = {"EarlyStopping{'monitor': 'val/loss'}": {"wait": 1}}
    content = {"state_dict": {"w": torch.ones(2, 3)}, "global_step": 7, "epoch": 1, "loops": {}, "optimizer_states": []}
    torch.save({**content, "callbacks": callbacks, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_consolidate(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "one.safetensors"
    assert main(["consolidate", f"{checkpoint}", f"{out}"]) == 0
    assert torch.equal(WeightsFile(out).tensor("w"), torch.ones(2, 3))
    assert "one.safetensors" in capsys.readouterr().err


def test_inspect(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["inspect", f"{checkpoint}"]) == 0
    rows = {line[:18].strip(): line[18:].strip() for line in capsys.readouterr().out.splitlines()}
    assert rows["engine"] == "one device or DDP"
    assert (rows["step"], rows["epoch"], rows["Lightning"]) == ("7", "1", "not stored")
    assert rows["weights"] == "1 tensors, 24 bytes: 6 float32"
    assert rows["callbacks"] == "EarlyStopping{'monitor': 'val/loss'}"
    assert rows["hyper-parameters"] == "lr"
    assert rows["goes on from here"] == "yes"


def test_a_safetensors_file_can_be_inspected(checkpoint, tmp_path, capsys):
    main(["consolidate", f"{checkpoint}", f"{tmp_path}/one.safetensors"])
    assert main(["inspect", f"{tmp_path}/one.safetensors"]) == 0
    assert "weights only" in capsys.readouterr().out


def test_what_cannot_be_read_or_written(checkpoint, tmp_path, refused):
    assert "there is no checkpoint" in refused("inspect", f"{tmp_path}/none.ckpt")
    assert "there is no checkpoint" in refused("consolidate", f"{tmp_path}/none.ckpt", f"{tmp_path}/o.safetensors")
    assert "ends in .safetensors" in refused("consolidate", f"{checkpoint}", f"{tmp_path}/one.pt")
    assert "could not be saved" in refused("consolidate", f"{checkpoint}", f"{checkpoint}/one.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    assert "truncated" in refused("inspect", f"{checkpoint}")


def test_a_full_disk_leaves_the_old_file(checkpoint, tmp_path, refused, monkeypatch):
    out = tmp_path / "one.safetensors"
    main(["consolidate", f"{checkpoint}", f"{out}"])
    before = out.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("lightning_tricks.storage.weights_file.os.fsync", full)
        assert "could not be saved (No space left on device): it needs" in refused(
            "consolidate", f"{checkpoint}", f"{out}"
        )
    assert out.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["last.ckpt", "one.safetensors"]
