"""EarlyStopping and CheckpointEnsemble with two real processes whose scores differ, and on a disk that is full."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    group = Group(2, tmp_path_factory.mktemp("stopping") / "ranks", "tests.callbacks.stopping_jobs:prepare")
    yield group
    group.close()


@pytest.fixture
def job(group, tmp_path):
    """Run a job on two ranks, which must say the same; a failure or a hang shows the traceback of each."""

    def run(name, engine="ddp", **arguments):
        found = group.call(f"tests.callbacks.stopping_jobs:{name}", engine=engine, folder=f"{tmp_path}", **arguments)
        assert found[0] == found[1]
        return found[0]

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_make_one_decision(job, engine):
    assert job("one_decision", engine) == ["`val/score` did not improve for 2 validations", 4, [3.0, 4.0]]


def test_not_a_number_on_one_rank(job):
    assert job("not_a_number_on_one") == [4.0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_what_no_rank_logs_is_passed_over(job, engine):
    assert job("passed_over", engine) == [2, [3.0, 4.0, 5.0]]


@pytest.mark.parametrize("which", ["stopping", "ensemble"])
@pytest.mark.parametrize("at", [0, 2])
def test_what_one_rank_logs_is_one_error(job, at, which):
    assert "`val/score` was logged on 1 of 2 ranks, not on [1]" in job("logged_on_one", at=at, which=which)


def test_a_rank_that_logs_nothing_at_all(job):
    assert "`val/score` was logged on 1 of 2 ranks, not on [1]" in job("nothing_but_on_one")


def test_what_no_rank_ever_logs(job):
    assert "`val/score`, which validation does not log. It logs: `val/other`" in job("logged_on_none")


def test_a_soup_that_one_rank_cannot_score(job):
    assert "logged on 1 of 2 ranks, not on [1]" in job("scored_on_one")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero_3", marks=ZERO)])
def test_a_full_disk_leaves_the_best_before(job, engine):
    assert "best-step=4" in job("best_on_a_full_disk", engine)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero_3", marks=ZERO)])
def test_a_full_disk_leaves_the_ensemble_before(job, engine):
    assert "ensemble.ckpt" in job("ensemble_on_a_full_disk", engine)
