"""A worker that crashes, raises or hangs fails its job in time, with its traceback; the next job has a fresh group."""

import time

import pytest

from tests.conformance import engines
from tests.conformance.engines import Group, WorkerError

JOBS = "tests.conformance.jobs"


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "GRACE", 1.0)
    group = Group(2, tmp_path)
    yield group
    group.close()


def failure(group, job, limit=60.0, **arguments):
    """The message with which a job fails; a fresh group does the next job."""
    start = time.monotonic()
    with pytest.raises(WorkerError) as error:
        group.call(f"{JOBS}:{job}", limit=limit, **arguments)
    assert time.monotonic() - start < 30
    starts = group.starts
    assert [reply["RANK"] for reply in group.call(f"{JOBS}:environment")] == ["0", "1"]
    assert group.starts == starts + 1
    return str(error.value)


def test_many_jobs_in_the_same_processes(group):
    first = group.call(f"{JOBS}:process_id")
    assert len(set(first)) == 2
    assert group.call(f"{JOBS}:process_id") == first
    assert group.call(f"{JOBS}:environment")[1] == {"RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}


def test_a_crash_shows_where(group):
    message = failure(group, "crash", on_rank=1)
    assert "rank 1 ended with exit status -11" in message
    assert "Segmentation fault" in message
    assert "in crash" in message
    assert "rank 0 did not answer" in message


def test_an_exit_shows_the_last_words(group):
    message = failure(group, "leave", status=3)
    assert "rank 0 ended with exit status 3:\nlast words" in message


def test_an_exception_shows_its_traceback_and_where_the_other_rank_waits(group):
    message = failure(group, "fail", on_rank=0)
    assert "rank 0: Traceback" in message
    assert "ValueError: a broken trick" in message
    assert "in wait_for_the_other_rank" in message


def test_a_hang_ends_at_its_limit_and_shows_where(group):
    group.call(f"{JOBS}:process_id")
    message = failure(group, "wait_for_the_other_rank", limit=1.0)
    assert message.count("did not answer within 1 s; its threads were here") == 2
    assert message.count("in wait_for_the_other_rank") == 2


def test_one_device_is_a_plain_process(tmp_path):
    group = Group(1, tmp_path)
    try:
        assert group.call(f"{JOBS}:environment")[0]["RANK"] is None
    finally:
        group.close()


def test_no_process_is_left_behind(group):
    import psutil

    ids = group.call(f"{JOBS}:process_id")
    group.close()
    assert not any(psutil.pid_exists(process) for process in ids)
