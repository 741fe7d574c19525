"""Which checkpoint a run goes on from."""

import os
import time

import pytest
import torch

from lightning_tricks.cli.resume import CHOSEN, is_complete, newest_checkpoint, resume_from


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint `age` seconds old."""

    def write(name, age, **content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {"w": torch.zeros(100)}, **content}, path)
        return old(path, age)

    return write


def old(path, age):
    moment = time.time() - age
    os.utime(path, (moment, moment))
    return path


RUN = {"loops": {}, "optimizer_states": []}


def test_the_newest_of_all_below_the_folders(save, tmp_path):
    save("a/version_0/step=9.ckpt", 30, **RUN)
    newest = save("a/version_1/step=5.ckpt", 20, **RUN)
    assert newest_checkpoint([tmp_path / "a", tmp_path / "none"]) == newest
    elsewhere = save("b/step=6.ckpt", 10, **RUN)
    assert newest_checkpoint([tmp_path / "a", tmp_path / "b"]) == elsewhere


def test_weights_without_training_state_are_passed_over(save, tmp_path):
    run = save("step=5.ckpt", 20, **RUN)
    save("ensemble.ckpt", 10, hyper_parameters={"labels": ["a"]})
    assert newest_checkpoint([tmp_path]) == run


def test_what_was_cut_off_is_passed_over_and_named(save, tmp_path, caplog):
    run = save("step=5.ckpt", 20, **RUN)
    cut = save("step=6.ckpt", 10, **RUN)
    cut.write_bytes(cut.read_bytes()[:-100])
    assert not is_complete(cut)
    assert newest_checkpoint([tmp_path]) == run
    assert "step=6.ckpt` is incomplete" in caplog.text


def test_folders_count_once_they_have_their_name(save, tmp_path):
    run = save("step=5.ckpt", 30, **RUN)
    (tmp_path / ".step=7.ckpt.partial" / "checkpoint").mkdir(parents=True)
    assert newest_checkpoint([tmp_path]) == run
    folder = tmp_path / "step=6.ckpt"
    folder.mkdir()
    (folder / "latest").write_text("checkpoint")
    assert newest_checkpoint([tmp_path]) == folder


def test_a_pickle_is_looked_at_but_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({**RUN, "trap": Trap()}, tmp_path / "step=1.ckpt")
    assert newest_checkpoint([tmp_path]) == tmp_path / "step=1.ckpt"
    assert not (tmp_path / "trapped").exists()


@pytest.fixture
def environment(monkeypatch):
    for name in (CHOSEN, "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that both are taken away after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_processes_that_a_run_starts_take_the_same(save, tmp_path, environment):
    first = save("step=5.ckpt", 20, **RUN)
    assert resume_from([tmp_path]) == first
    save("step=6.ckpt", 10, **RUN)
    environment.setenv("LOCAL_RANK", "1")
    assert resume_from([tmp_path]) == first


def test_they_start_afresh_together_too(save, tmp_path, environment):
    assert resume_from([tmp_path]) is None
    save("step=1.ckpt", 1, **RUN)
    environment.setenv("LOCAL_RANK", "1")
    assert resume_from([tmp_path]) is None


def test_a_new_run_does_not_take_an_old_choice(save, tmp_path, environment):
    environment.setenv(CHOSEN, "old.ckpt")
    newest = save("step=5.ckpt", 20, **RUN)
    assert resume_from([tmp_path]) == newest
