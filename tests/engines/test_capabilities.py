import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_tricks import engines
from lightning_tricks.engines import Engine
from lightning_tricks.engines._capabilities import ENGINES, REFUSALS, capabilities, capability_tables, refusal
from lightning_tricks.engines._deepspeed import _local_partition
from lightning_tricks.engines._zero_step import StepGradients
from lightning_tricks.errors import MisconfigurationError, UnsupportedError

ROOT = Path(__file__).parents[2]
START, END = "<!-- rendered from engines/_capabilities.py -->\n\n", "\n<!-- end of what is rendered -->"
METHODS = [name for name, _ in inspect.getmembers(Engine, inspect.isfunction) if not name.startswith("_")]


def test_the_page_holds_what_the_code_says():
    """When this fails, paste `capability_tables()` between the two comments of docs/engines.md."""
    page = (ROOT / "docs" / "engines.md").read_text()
    assert page.partition(START)[2].partition(END)[0] == capability_tables()


@pytest.mark.parametrize("engine", ENGINES)
def test_every_method_has_an_answer_on_every_engine(engine):
    assert {"gradient_norm", "veto_step", "put_shards", "barrier"} <= set(METHODS)
    entries = capabilities(engine)
    assert sorted(entry.method for entry in entries) == METHODS
    assert all(entry.exact and entry.phase and entry.collective for entry in entries)


def test_refusals_name_methods_and_engines_that_exist():
    for key, entry in REFUSALS.items():
        assert set(entry.methods) <= set(METHODS), key
        assert set(entry.engines) <= set(ENGINES), key


def test_refusals_are_per_engine():
    refused = {engine: {c.method: c.refused for c in capabilities(engine)}["put_shards"] for engine in ENGINES}
    assert refused["zero_3"] == (REFUSALS["nvme"],)
    assert refused["fsdp2"] == (REFUSALS["tensor_parallel"],)
    assert refused["fsdp1"] == tuple(entry for entry in REFUSALS.values() if entry.engines == ("fsdp1",))
    assert refused["ddp"] == refused["zero_1"] == ()


def test_unknown_engine_is_told():
    with pytest.raises(MisconfigurationError, match="no engine `fsdp3`: choose one of one_device, ddp"):
        capabilities("fsdp3")


def test_refusal_becomes_the_error():
    error = refusal("fused_scaler", engine="ddp", optimizer="AdamW")
    assert isinstance(error, UnsupportedError)
    assert str(error) == (
        "The gradient norm cannot run on ddp with precision '16-mixed': a fused AdamW unscales its gradients inside its"
        " step. Instead, pass `fused=False` to the optimizer, or use `precision='bf16-mixed'`."
    )


def test_engines_raise_every_refusal_of_the_table_and_no_other():
    folder = Path(inspect.getfile(engines)).parent
    files = [
        "_base.py",
        "_weights.py",
        "_plain.py",
        "_fsdp1.py",
        "_fsdp2.py",
        "_flat.py",
        "_deepspeed.py",
        "_zero_parts.py",
        "_zero_silence.py",
        "_zero_step.py",
    ]
    code = "".join((folder / name).read_text() for name in files)
    assert set(re.findall(r'refusal\("(\w+)"', code)) == set(REFUSALS)
    assert re.findall(r"raise UnsupportedError\(\s*([^,]+),", code) == [
        '"A trick"'
    ]  # DeepSpeed without ZeRO: no engine


def test_masters_on_nvme_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter._z3_optimizer = SimpleNamespace(swap_optimizer=True)
    with pytest.raises(UnsupportedError, match=r"masters are swapped out\. Instead, offload to the CPU"):
        _local_partition(parameter)


def test_steps_that_ask_for_no_norm_are_refused():
    optimizer = SimpleNamespace(scaled_global_norm=None, _update_scale=None, compute_grad_norm=False)
    with pytest.raises(UnsupportedError, match="leave `compute_grad_norm` out"):
        StepGradients(SimpleNamespace(optimizer=optimizer), 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed")
def test_optimizers_that_lack_a_private_method_are_refused(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UnsupportedError, match=r"DeepSpeed .* its SimpleNamespace has no `_get_norm_groups`"):
        StepGradients(SimpleNamespace(optimizer=SimpleNamespace()), 3)
