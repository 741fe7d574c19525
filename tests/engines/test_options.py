"""The strategies' options, each on two real processes."""

import importlib.util
import re

import pytest

from lightning_tricks.engines import FSDP2Strategy, ZeroStrategy
from lightning_tricks.errors import MisconfigurationError
from tests.conformance.engines import Group
from tests.engines import option_jobs as jobs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
ENGINES = ["fsdp2", *(pytest.param(f"zero_{stage}", marks=ZERO) for stage in (2, 3))]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Run a job on two ranks; a failure shows the traceback of each."""
    folder = tmp_path_factory.mktemp("options")
    group = Group(2, folder / "ranks", "tests.engines.option_jobs:prepare")
    yield lambda name, engine, **arguments: group.call(
        f"tests.engines.option_jobs:{name}", engine=engine, folder=f"{folder}", **arguments
    )
    group.close()


@pytest.mark.parametrize(("suffix", "precision"), [("bf16", "bf16-mixed"), ("fp16", "16-mixed")])
@pytest.mark.parametrize("engine", ENGINES)
def test_precision_in_the_flag(job, engine, suffix, precision):
    job("precision_in_the_flag", engine, suffix=suffix, precision=precision)


@pytest.mark.parametrize("module", jobs.MODULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_activation_checkpointing_changes_no_gradient(job, engine, module):
    job("checkpointed", engine, module=module)


@pytest.mark.parametrize("engine", ENGINES)
def test_activation_checkpointing_twice_is_once(job, engine):
    job("checkpointed_twice", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_activation_checkpointing_without_blocks_is_refused(job, engine):
    job("checkpointing_refusals", engine)


@pytest.mark.parametrize("policy", jobs.POLICIES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_policy_chooses_what_is_computed_again(job, engine, policy):
    job("checkpointed_parts", engine, policy=policy)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_policy_that_chooses_nothing_or_something_else_later_is_refused(job, engine):
    job("policy_refusals", engine)


@pytest.mark.parametrize("build", [FSDP2Strategy, pytest.param(ZeroStrategy, marks=ZERO)])
def test_activation_checkpointing_is_blocks_a_policy_or_none(build):
    for value in (True, [], [1]):
        with pytest.raises(
            MisconfigurationError, match=rf"'blocks', a list of class names, .* got {re.escape(f'{value}')}"
        ):
            build(activation_checkpointing=value)
    with pytest.raises(MisconfigurationError, match=r"or a list of class names, got 'Block': write \['Block'\]"):
        build(activation_checkpointing="Block")


@pytest.mark.parametrize("engine", ENGINES)
def test_offload_changes_where_and_not_what(job, engine):
    job("offloaded", engine)


@pytest.mark.parametrize("build", [FSDP2Strategy, pytest.param(ZeroStrategy, marks=ZERO)])
def test_offload_is_cpu_or_none(build):
    with pytest.raises(MisconfigurationError, match=r"`offload` must be 'cpu'.* or None, got True"):
        build(offload=True)
