"""Manual optimisation, several optimizers and closures: as on one device, or refused before the first step."""

import importlib.util

import pytest

from tests.conformance.engines import Group
from tests.engines import manual_jobs as jobs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
TORCH_ENGINES = ["ddp", "fsdp2"]
ZERO_ENGINES = [pytest.param(f"zero_{stage}", marks=ZERO) for stage in (1, 2, 3)]
ONE_OPTIMIZER = [name for name in jobs.MODULES if not name.startswith("two") and name not in ("lbfgs", "dropping")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks, after one device where it writes what they are compared with."""
    folder = tmp_path_factory.mktemp("manual")
    groups = {world: Group(world, folder / f"{world}", "tests.engines.manual_jobs:prepare") for world in (1, 2)}
    written = set()

    def call(name, engine, **arguments):
        reference = f"{arguments}"
        if name == "equals_one_device" and reference not in written:
            first = {**arguments, "engine": "one_device", "folder": f"{folder}", "flag": None}
            groups[1].call(f"tests.engines.manual_jobs:{name}", **first)
            written.add(reference)
        groups[2].call(f"tests.engines.manual_jobs:{name}", engine=engine, folder=f"{folder}", **arguments)

    yield call
    for group in groups.values():
        group.close()


@pytest.mark.parametrize(("module", "clip"), [*((name, None) for name in ONE_OPTIMIZER), ("window in one batch", 0.05)])
@pytest.mark.parametrize("engine", [*TORCH_ENGINES, *ZERO_ENGINES])
def test_manual_optimisation_is_that_of_one_device(job, engine, module, clip):
    job("equals_one_device", engine, module=module, clip=clip)


@pytest.mark.parametrize("engine", [pytest.param(f"zero_{stage}_offload", marks=ZERO) for stage in (2, 3)])
def test_manual_optimisation_with_offload(job, engine):
    job("equals_one_device", engine, module="window over batches", clip=None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16"])
@pytest.mark.parametrize("engine", ZERO_ENGINES)
def test_accumulated_by_hand_or_by_the_trainer(job, engine, precision):
    job("as_automatic", engine, precision=precision)


@pytest.mark.parametrize(("module", "clip"), [("two", None), ("two, window", 0.05)])
@pytest.mark.parametrize("engine", TORCH_ENGINES)
def test_two_optimizers_are_those_of_one_device(job, engine, module, clip):
    job("equals_one_device", engine, module=module, clip=clip)


@pytest.mark.parametrize("flag", ["fsdp2", "ddp_find_unused_parameters_true"])
def test_toggled_optimizers(job, flag):
    """DDP itself must be told that a backward leaves parameters out."""
    job("equals_one_device", flag[:5].removesuffix("_f"), module="two, toggled", clip=None, flag=flag)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("engine", TORCH_ENGINES)
def test_each_optimizer_has_its_own_limit_on_unscaled_gradients(job, engine, scaled):
    job("limits_of_each", engine, scaled=scaled)


@pytest.mark.parametrize("engine", TORCH_ENGINES)
def test_a_veto_is_of_one_optimizer(job, engine):
    job("vetoes_of_each", engine)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (
            "two",
            r"Training with 2 optimizers cannot run on ZeRO: .* Instead, put all .*'fsdp2'` or 'ddp'",
        ),
        ("lbfgs", r"LBFGS cannot run on ZeRO: it steers by the loss .* Instead, .* or train on one device\."),
    ],
)
@pytest.mark.parametrize("engine", ZERO_ENGINES)
def test_what_deepspeed_cannot_step_is_refused(job, engine, module, match):
    job("refused", engine, module=module, match=match)


def test_closures_under_fsdp2_are_refused(job):
    job("refused", "fsdp2", module="lbfgs", match=r"LBFGS cannot run on FSDP2: .* Instead, .* or train on one device\.")


@pytest.mark.parametrize("engine", [*TORCH_ENGINES, ZERO_ENGINES[0], ZERO_ENGINES[2]])
def test_gradients_given_up(job, engine):
    job("equals_one_device", engine, module="dropping", clip=None)


@ZERO
def test_gradients_given_up_under_zero_2_are_refused(job):
    job("refused", "zero_2", module="dropping", match=r"`zero_grad\(\)` between a backward and its step .* zero_2")
