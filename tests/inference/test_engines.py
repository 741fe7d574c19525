"""Members that any engine wrote, and prediction ensembles on two ranks."""

import importlib.util
import shutil

import pytest
import torch

from lightning_tricks.engines import read_checkpoint
from lightning_tricks.errors import CheckpointError
from lightning_tricks.inference import average_checkpoints
from tests.conformance.engines import Group
from tests.inference import jobs

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ENGINES = {"ddp": 1, "fsdp2": 2, **({"zero_1": 3, "zero_2": 4, "zero_3": 2} if HAS_DEEPSPEED else {})}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    group = Group(2, tmp_path_factory.mktemp("ranks"), "tests.inference.jobs:prepare")
    yield group
    group.close()


@pytest.fixture(scope="module")
def members(group, tmp_path_factory):
    """One checkpoint of each engine, at a step of its own."""
    folder = tmp_path_factory.mktemp("members")
    for engine, step in ENGINES.items():
        group.call("tests.inference.jobs:save", engine=engine, folder=f"{folder}", step=step)
    return [folder / f"{engine}-member.ckpt" for engine in ENGINES]


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_any_engines_checkpoint_is_a_member(members, tmp_path, suffix):
    """`read_checkpoint` is held to DeepSpeed's and torch's own reading in tests/engines."""
    average_checkpoints(members, tmp_path / f"mean.{suffix}", weights=list(range(1, len(members) + 1)))
    mean = read_checkpoint(tmp_path / f"mean.{suffix}")
    states = [read_checkpoint(path)["state_dict"] for path in members]
    total = sum(range(1, len(members) + 1))
    for name, value in mean["state_dict"].items():
        if value.is_floating_point():
            expected = sum(weight * state[name].double() for weight, state in enumerate(states, 1)) / total
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    newest = max(range(len(members)), key=lambda place: (list(ENGINES.values())[place], place))
    assert torch.equal(mean["state_dict"]["seen"], states[newest]["seen"])
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    jobs.Net().load_state_dict(mean["state_dict"])


def test_a_truncated_shard_is_named(members, tmp_path):
    for member in members[1:]:
        copy = shutil.copytree(member, tmp_path / member.name)
        shard = next(path for path in sorted(copy.rglob("*")) if path.suffix == ".distcp" or "optim" in path.name)
        shard.write_bytes(shard.read_bytes()[:-200])
        with pytest.raises(CheckpointError, match=member.name):
            average_checkpoints([members[0], copy], tmp_path / "mean.ckpt")


def test_an_ensemble_scores_alike_on_one_device_and_two_ranks(group, members, tmp_path):
    paths = [str(path) for path in members]
    on_two = group.call("tests.inference.jobs:tested", engine="ddp", folder=f"{tmp_path}", members=paths)
    alone = jobs.tested("one_device", f"{tmp_path}", paths)
    assert on_two[0] == on_two[1]
    assert on_two[0] == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_engines_that_cut_the_module_up_refuse(group, members, tmp_path):
    for engine in list(ENGINES)[1:]:
        said = group.call(
            "tests.inference.jobs:refused", engine=engine, folder=f"{tmp_path}", members=[str(members[0])]
        )
        assert said[0] == said[1]
        assert f"PredictionEnsemble cannot run on {engine}" in said[0]
