"""Folders that take their name when they are complete, whatever moment the process is killed at."""

import os
import shutil
from pathlib import Path

import pytest

from lightning_tricks.cli.resume import newest_checkpoint
from lightning_tricks.storage import _atomic
from lightning_tricks.storage._atomic import finish_publishing, partial_name, publish_folder

PARTS = ("a", "b", "c")


class Killed(BaseException):
    """The process is gone: nothing after this runs."""


def write(path, content):
    """A folder with its parts, not published."""
    path.mkdir()
    for part in PARTS:
        (path / part).write_text(content)


def content_of(path):
    found = {part.name: part.read_text() for part in path.iterdir()}
    assert set(found) == set(PARTS), f"{path} holds {sorted(found)}"
    assert len(set(found.values())) == 1
    return found["a"]


@pytest.fixture
def killed_at(monkeypatch):
    """Let the process die at its so-manieth change of the disk: before it, or in the middle of a deletion."""

    def arm(moment):
        count = 0

        def dying(real, is_deletion):
            def change(*arguments, **options):
                nonlocal count
                count += 1
                if count == moment:
                    if is_deletion:
                        next(Path(arguments[0]).iterdir()).unlink()
                    raise Killed
                return real(*arguments, **options)

            return change

        monkeypatch.setattr(_atomic.os, "replace", dying(os.replace, False))
        monkeypatch.setattr(_atomic.os, "fsync", dying(os.fsync, False))
        monkeypatch.setattr(_atomic.shutil, "rmtree", dying(shutil.rmtree, True))

    yield arm
    monkeypatch.undo()


def publish(path, content, killed_at=None, moment=0):
    """Whether the process lived."""
    partial = partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)
    write(partial, content)
    if killed_at is not None:
        killed_at(moment)
    try:
        publish_folder(partial, path)
    except Killed:
        return False
    return True


MOMENTS = range(1, 10)  # 3 parts flushed, named complete, flushed, old aside, named, flushed, old deleted


@pytest.mark.parametrize("moment", [*MOMENTS, 10])
@pytest.mark.parametrize("replaces", [True, False])
def test_killed_at_any_moment_there_is_a_complete_one(tmp_path, killed_at, monkeypatch, moment, replaces):
    path = tmp_path / "step=1.ckpt"
    if replaces:
        publish(path, "old")
    lived = publish(path, "new", killed_at, moment)
    monkeypatch.undo()
    assert lived == (moment > (9 if replaces else 7))
    found = newest_checkpoint([tmp_path])
    if not replaces and moment <= 4:
        assert found is None
    else:
        assert found == path
        assert content_of(path) == ("new" if moment > 4 else "old")
    assert publish(path, "next")
    assert content_of(path) == "next"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("second", MOMENTS)
@pytest.mark.parametrize("first", MOMENTS)
def test_killed_twice_without_a_resume_between(tmp_path, killed_at, monkeypatch, first, second):
    path = tmp_path / "step=1.ckpt"
    publish(path, "old")
    publish(path, "new", killed_at, first)
    monkeypatch.undo()
    publish(path, "newer", killed_at, second)
    monkeypatch.undo()
    assert newest_checkpoint([tmp_path]) == path
    assert content_of(path) in (("new", "newer") if first > 4 else ("old", "newer"))


def test_a_file_is_replaced_by_a_folder(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_text("of one device")
    publish(path, "new")
    assert content_of(path) == "new"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_what_was_deleted_on_purpose_stays_so(tmp_path, killed_at, monkeypatch):
    path = tmp_path / "step=1.ckpt"
    publish(path, "old")
    publish(path, "new", killed_at, 9)  # in the middle of deleting the old one
    monkeypatch.undo()
    shutil.rmtree(path)
    assert finish_publishing(tmp_path) == []
    assert newest_checkpoint([tmp_path]) is None
