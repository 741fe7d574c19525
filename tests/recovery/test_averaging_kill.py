"""`kill -9` of a whole group while weights are averaged: in a swap, and in a save; nothing is lost."""

import importlib.util
import json
import random

import pytest
import torch

from lightning_tricks.cli.resume import newest_checkpoint
from lightning_tricks.engines import read_checkpoint
from tests.conformance.engines import Group, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(290)]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
JOB = "tests.recovery.kill_jobs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fits in forked processes of one group."""
    group = Group(2, tmp_path_factory.mktemp("ranks"), f"{JOB}:prepare")
    yield lambda **arguments: group.call(f"{JOB}:fit", port=free_port(), averaging=True, **arguments)[0]
    group.close()


@pytest.mark.parametrize("engine", ["one_device", "fsdp2", "zero_2"])
def test_killed_in_a_swap_or_a_save_and_resumed(run, tmp_path, engine):
    if engine.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("not run: needs DeepSpeed")
    whole = tmp_path / "whole"
    whole.mkdir()
    *saving, _ = run(engine=engine, folder=f"{whole}")
    swaps = json.loads((whole / "swaps").read_text())
    expected, chosen = torch.load(whole / "weights.pt"), random.Random(engine)
    later = [moment for moment in swaps if moment > saving[len(saving) // 2]]
    for point, moment in enumerate([chosen.choice(later), chosen.choice(saving[len(saving) // 2 :])]):
        folder = tmp_path / f"{point}"
        folder.mkdir()
        run(engine=engine, folder=f"{folder}", moment=moment)
        assert read_checkpoint(newest_checkpoint([folder]))["lightning_tricks"]["values"]
        run(engine=engine, folder=f"{folder}")
        weights = torch.load(folder / "weights.pt")
        different = [name for name, value in expected.items() if not torch.equal(weights[name], value)]
        assert not different, f"killed at moment {moment}: {different}"
