"""Saved on two ranks and resumed on one, and the reverse: weights and moments of the uninterrupted run."""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = pytest.mark.slow

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
JOBS = "tests.engines.checkpoint_jobs"
TOLERANCE = 1e-6  # relative to the largest value of each tensor: other ranks sum in another order


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """A group of one process, and one of two. A single process is a group too, so that it can shard."""
    folder = tmp_path_factory.mktemp("ranks")
    made = {world: Group(world, folder / f"{world}", f"{JOBS}:prepare") for world in (1, 2)}
    yield made
    for group in made.values():
        group.close()


@pytest.mark.parametrize(("saved", "resumed"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))])
def test_resumed_on_another_number_of_ranks(groups, tmp_path, engine, saved, resumed):
    arguments = {"engine": engine, "folder": f"{tmp_path}", "groups": engine != "zero_3"}
    groups[saved].call(f"{JOBS}:uninterrupted", **arguments)
    for _ in range(2):  # ZeRO's checkpoint is converted once, and read twice
        distances = groups[resumed].call(f"{JOBS}:resumed", **arguments)
        assert max(distances) <= TOLERANCE, f"{max(distances):.1e}"
    universal = tmp_path / "step5.ckpt" / "checkpoint_universal"
    assert universal.is_dir() == engine.startswith("zero")
    assert not list(tmp_path.rglob("*.partial"))
    assert max(groups[saved].call(f"{JOBS}:resumed", **arguments)) == 0  # as before, beside the conversion


@ZERO
def test_what_the_conversion_would_lose_is_refused(groups, tmp_path):
    common = {"folder": f"{tmp_path}", "engine": "zero_3", "groups": True}
    groups[2].call(f"{JOBS}:uninterrupted", **common)
    message = "all parameter groups the first one's options"
    groups[1].call(f"{JOBS}:refused", name="step5.ckpt", match=message, optimizer="adamw", **common)
    groups[2].call(f"{JOBS}:save_sgd", engine="zero_2", folder=f"{tmp_path}")
    common = {**common, "engine": "zero_2", "groups": False}
    groups[1].call(f"{JOBS}:refused", name="sgd.ckpt", match="Adam and AdamW", optimizer="sgd", **common)
