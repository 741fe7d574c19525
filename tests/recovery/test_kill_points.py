"""`kill -9` of a whole group at twenty moments of its fit; resumed, it ends with the uninterrupted run's weights."""

import importlib.util
import random

import pytest
import torch

from lightning_tricks.cli.resume import newest_checkpoint
from lightning_tricks.engines import read_checkpoint
from tests.conformance.engines import ENGINES, Group, free_port
from tests.recovery.kill_jobs import NAME, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
JOB = "tests.recovery.kill_jobs"
POINTS = {  # engine -> how many: twenty in all
    "one_device": 2,
    "ddp": 2,
    "fsdp2": 3,
    "fsdp2_offload": 2,
    "zero_1": 2,
    "zero_2": 2,
    "zero_2_offload": 2,
    "zero_3": 3,
    "zero_3_offload": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fits in forked processes of one group."""
    group = Group(2, tmp_path_factory.mktemp("ranks"), f"{JOB}:prepare")
    yield lambda **arguments: group.call(f"{JOB}:fit", port=free_port(), **arguments)[0]
    group.close()


def test_there_are_twenty_points_on_every_engine():
    assert sum(POINTS.values()) == 20
    assert set(POINTS) == set(ENGINES) - {"hsdp"}  # which is fsdp2 on one machine


@pytest.mark.parametrize("engine", POINTS)
def test_killed_at_any_moment_and_resumed(run, tmp_path, engine):
    if engine.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("not run: needs DeepSpeed")
    whole = tmp_path / "whole"
    whole.mkdir()
    *saving, count = run(engine=engine, folder=f"{whole}")
    expected = torch.load(whole / "weights.pt")
    chosen = random.Random(engine)
    for point in range(POINTS[engine]):
        folder = tmp_path / f"{point}"
        folder.mkdir()
        if point == 0:  # in a save, and not in the first one: there is a checkpoint to lose
            moment, delay = chosen.choice(saving[len(saving) // 2 :]), 0.0
        else:
            moment, delay = chosen.randrange(saving[0], count * 3 // 4), chosen.choice([0.0, chosen.uniform(0, 0.02)])
        run(engine=engine, folder=f"{folder}", moment=moment, delay=delay)
        found = newest_checkpoint([folder])
        assert found is None or read_checkpoint(found)["global_step"] in range(2, STEPS, 2)
        assert found is not None or point > 0
        run(engine=engine, folder=f"{folder}")
        weights = torch.load(folder / "weights.pt")
        different = [name for name, value in expected.items() if not torch.equal(weights[name], value)]
        assert not different, f"killed at moment {moment} of {count}, {delay:.3f} s later: {different}"
        assert [item.name for item in folder.iterdir() if NAME in item.name] == [NAME]
