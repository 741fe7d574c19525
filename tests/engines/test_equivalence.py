"""After 20 AdamW steps every engine holds what DDP holds on the same ranks, and what one device holds."""

import importlib.util

import pytest

from tests.conformance.engines import Group
from tests.engines import equivalence_jobs as jobs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = [pytest.param(engine, marks=ZERO if engine.startswith("zero") else ()) for engine in jobs.ENGINES]
# Offload changes where and not what, at every precision: `test_options.py`.
LOW = [engine for engine in ENGINES if not engine.values[0].endswith("offload")]
FP32, BF16 = "32-true", "bf16-mixed"
SEED = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("equivalence")


@pytest.fixture(scope="module")
def train(folder):
    """Train a model on two ranks, or on one."""
    groups = {world: Group(world, folder / f"{world}", "tests.engines.equivalence_jobs:prepare") for world in (1, 2)}

    def call(engine, precision, model):
        group = groups[1 if engine == "one_device" else 2]
        options = {"engine": engine, "precision": precision, "model": model, "seed": SEED, "folder": f"{folder}"}
        return group.call("tests.engines.equivalence_jobs:train", **options)

    for model in jobs.MODELS:
        call("one_device", FP32, model)
        for precision in (FP32, BF16):
            call("ddp", precision, model)
    yield call
    for group in groups.values():
        group.close()


@pytest.mark.parametrize("model", jobs.MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_fp32_is_ddp_and_one_device(train, folder, engine, model):
    assert train(engine, FP32, model) == [{"tied": True}] * 2
    assert jobs.distance(folder, model, SEED, (engine, FP32), ("ddp", FP32)) <= 1e-6
    if jobs.MODELS[model].compares_with_one_device:
        assert jobs.distance(folder, model, SEED, (engine, FP32), ("one_device", FP32)) <= 2e-5


@pytest.mark.parametrize("model", jobs.MODELS)
@pytest.mark.parametrize("engine", LOW)
def test_bf16_is_as_near_to_fp32_as_ddp_is(train, folder, engine, model):
    assert train(engine, BF16, model) == [{"tied": True}] * 2
    of_ddp = jobs.distance(folder, model, SEED, ("ddp", BF16), ("ddp", FP32))
    assert of_ddp > 1e-4
    assert jobs.distance(folder, model, SEED, (engine, BF16), ("ddp", FP32)) <= 2 * of_ddp
