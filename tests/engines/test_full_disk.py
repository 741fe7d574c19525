"""A disk that fills up while a checkpoint is saved: one error on every rank, and the checkpoint before it intact."""

import importlib.util
import re

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
SHARDED = ["fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]
JOBS = "tests.engines.full_disk_jobs"


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    made = {world: Group(world, folder / f"{world}", f"{JOBS}:prepare") for world in (1, 2)}
    yield made
    for group in made.values():
        group.close()


def the_same(messages, name, rank=None):
    assert len(set(messages)) == 1
    assert name in messages[0]
    assert "make room" in messages[0]
    assert rank is None or f"by rank {rank} (" in messages[0]


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
@pytest.mark.parametrize("engine", SHARDED)
def test_a_folder(groups, tmp_path, engine, ranks):
    messages = groups[2].call(f"{JOBS}:saved", engine=engine, folder=f"{tmp_path}", ranks=ranks)
    the_same(messages, "last.ckpt", ranks[0])
    assert "MB of it were written and" in messages[0]
    assert "MB are free there" in messages[0]


@pytest.mark.parametrize(("engine", "world"), [("one_device", 1), ("ddp", 2)])
def test_a_file(groups, tmp_path, engine, world):
    messages = groups[world].call(f"{JOBS}:saved", engine=engine, folder=f"{tmp_path}", ranks=[0])
    the_same(messages, "last.ckpt")
    assert "File too large" in messages[0]
    assert re.search(r"needs about 0\.\d MB and [\d.]+ MB are free there", messages[0])


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_end"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero_3", marks=ZERO)])
def test_an_ensemble(groups, tmp_path, engine, hook):
    messages = groups[2].call(f"{JOBS}:ensemble", engine=engine, folder=f"{tmp_path}", hook=hook)
    the_same(messages, "member-" if hook == "on_validation_start" else "mean-")
