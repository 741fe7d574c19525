"""Hyper-parameters with OmegaConf's containers and paths survive on every engine; what could run code stays out."""

import importlib.util

import pytest
import torch
from omegaconf import DictConfig

from lightning_tricks.engines import allow_hyper_parameters
from tests.conformance.engines import ENGINES, Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
JOBS = "tests.engines.hyper_parameter_jobs"


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    made = {world: Group(world, folder / f"{world}", f"{JOBS}:prepare") for world in (1, 2)}
    yield made
    for group in made.values():
        group.close()


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if "offload" not in engine])
def test_survive(groups, tmp_path, engine):
    if engine.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("not run: needs DeepSpeed")
    for job in ("survive", "stay_out"):
        groups[ENGINES[engine][1]].call(f"{JOBS}:{job}", engine=engine, folder=f"{tmp_path}")


def test_what_the_user_allowed_stays_allowed():
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([DictConfig])
    try:
        with allow_hyper_parameters():
            assert len(torch.serialization.get_safe_globals()) > len(before) + 5
        assert DictConfig in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
