"""The reviews recipe trains under every flag, with the same config."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_tricks.engines import read_checkpoint
from lightning_tricks.strategies import PRESETS
from tests.conformance.engines import ENGINES, Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
FLAGS = [flag for flag in PRESETS if flag in ENGINES]  # tests/test_api.py says which ones CPU cannot run


@pytest.fixture(scope="module")
def trained(tiny_bert, tmp_path_factory):
    """Train on two ranks; what rank 0 logged, and the weights of the ensemble that was written."""
    folder = tmp_path_factory.mktemp("flags")
    group = Group(2, folder / "ranks", "tests.recipes.flag_jobs:prepare")

    def call(flag):
        job = "tests.recipes.flag_jobs:fit"
        (engine, logged), _ = group.call(job, flag=flag, encoder=tiny_bert, folder=f"{folder}")
        assert engine == ("fsdp2" if flag == "hsdp" else flag.removesuffix("_offload"))
        (ensemble,) = Path(folder, flag).rglob("ensemble.ckpt")
        return logged, read_checkpoint(ensemble)["state_dict"]

    yield call, call("ddp")
    group.close()


@pytest.mark.parametrize("flag", [pytest.param(flag, marks=ZERO if flag.startswith("zero") else ()) for flag in FLAGS])
def test_the_recipe_trains_as_under_ddp(trained, flag):
    train, (expected, weights) = trained
    logged, found = train(flag)
    assert {"train/loss", "val/macro_f1", "ensemble/val/macro_f1"} <= set(expected)
    assert logged == pytest.approx(expected, abs=1e-4)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.allclose(found[name], value, atol=1e-4), name
