"""Known traps of gradients, accumulation, non-finite steps and strategies, on every engine.

| trap | where it is covered |
|---|---|
| A1 norms and limits are of unscaled gradients | `test_a1` here; `scaled_gradients` of checks.py; on a GPU tests/gpu |
| A2 fused optimizers with a scaler | `test_fused_optimizer_with_a_scaler_is_refused` of test_plain.py, test_veto.py |
| A3 one clip per step, of the accumulated gradient | `test_a3` here; `clipping` of checks.py |
| A4 the same norm on every engine and precision | `twenty_steps` of checks.py; the matrix's GradientClipping row |
| A5 two thresholds | `test_a5` here |
| A6 no statistics of what is not finite | test_clipping.py; tests/callbacks/test_clipping_policies.py |
| A8 the limits of an uninterrupted run | the matrix's rows of Percentile and ZScore; test_clipping_policies.py |
| A10 two optimizers, manual optimisation | test_manual.py |
| B1 a loss is divided once | `accumulation` of checks.py |
| B2 a window cut short | test_normalization_engines.py of mixins; else `accumulation` of checks.py: as on one device |
| B3, B4, B5 ragged, empty and class-weighted micro-batches | tests/mixins/test_normalization_engines.py |
| B6 `outputs["loss"]` | test_normalization_engines.py of mixins; without them `test_b6` here: divided by the window |
| C1 not finite on one rank | `vetoed` of checks.py |
| C2 clearing gradients before the scaler's step | `vetoed_scaled`, `scaler_skips` of checks.py |
| I1 the weights of one device | `twenty_steps` of checks.py |
| I2 another number of ranks | test_other_ranks.py |
| I3 one file from any checkpoint | test_checkpoints.py |
| I4 the reported dtypes are the actual ones | test_precision.py, for those that a flag names |
| I5 manual optimisation where an engine cannot do it | test_manual.py |
| I6 every preset trains on CPU | the matrix |
| I7 loading runs nothing | `test_nothing_in_a_file_is_run`, `test_nothing_in_a_folder_is_run` of test_checkpoints.py |
| A9 norm clipping under Lightning's FSDPStrategy | `clipping` of test_fsdp1.py; Lightning's own class in tests/gpu |
"""

import importlib.util

import pytest

from tests.conformance.engines import Group

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["ddp", "fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3))]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks, or on one."""
    folder = tmp_path_factory.mktemp("traps")
    groups = {world: Group(world, folder / f"{world}", "tests.engines.trap_jobs:prepare") for world in (1, 2)}
    yield lambda name, engine, **arguments: groups[1 if engine == "one_device" else 2].call(
        f"tests.engines.trap_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    for group in groups.values():
        group.close()


@pytest.fixture(scope="module")
def no_tensor_reference(job):
    job("no_tensor", "one_device", kind="strings")


@pytest.mark.parametrize("engine", ENGINES)
def test_a1_a_limit_above_the_unscaled_norm_changes_nothing(job, engine):
    job("small_norms_stay", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a3_four_accumulated_batches_are_one_of_four_times_the_size(job, engine):
    job("four_are_one", engine)


@pytest.mark.parametrize("engine", ENGINES[2:])
def test_a5_a_configuration_and_a_callback_that_both_clip(job, engine):
    job("configuration_clips_too", engine)


@pytest.mark.parametrize("engine", ["one_device", *ENGINES])
def test_b6_the_loss_that_callbacks_get(job, engine):
    job("loss_of_callbacks", engine)


@pytest.mark.usefixtures("no_tensor_reference")
@pytest.mark.parametrize("kind", ["strings", "dictionary"])
@pytest.mark.parametrize("engine", ["one_device", *ENGINES])
def test_a_batch_without_a_tensor(job, engine, kind):
    job("no_tensor", engine, kind=kind)
