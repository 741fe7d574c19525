"""Adapters saved and exported by two ranks, and loaded on one device: what was trained is what is in the files."""

import importlib.util

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ZERO = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed")
SHARDED = ("fsdp2", "zero_3")
OF_PEFT = ("LoRA", "LoRA+, PiSSA", "QLoRA", "DoRA", "IA3", "PromptTuning", "PrefixTuning")
MERGED = ("LoRA", "LoRA+, PiSSA", "QLoRA", "DoRA", "IA3")
CELLS = [  # elsewhere, the methods that read a base which the engine has sharded or cast
    *(("ddp", method) for method in OF_PEFT),
    *(("fsdp2", method) for method in OF_PEFT[:4]),
    *(pytest.param(strategy, method, marks=ZERO) for strategy in ("zero_2", "zero_3") for method in OF_PEFT[:4]),
]


@pytest.mark.parametrize(("strategy", "method"), CELLS)
def test_files_hold_what_was_trained(strategy, method, group, tmp_path):
    options = {"strategy": strategy, "precision": "32-true", "folder": str(tmp_path), "method": method}
    first, second = group.call("tests.mixins.adapter_file_jobs:save_and_reload", **options)
    assert first["trained"] > 1e-3, "training has changed nothing"
    assert first["adapter"] < 1e-5
    assert second["adapter"] == ""
    if method not in MERGED:
        return
    if strategy in SHARDED:
        assert "spread over ranks by the strategy: merge on one device" in first["merged"] == second["merged"]
    else:
        assert first["merged"] < 1e-5
        assert second["merged"] == ""


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "PrefixTuning"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero_2", marks=ZERO)])
def test_in_low_precision(strategy, method, group, tmp_path):
    """Files hold the fp32 masters, as checkpoints do."""
    options = {"strategy": strategy, "precision": "bf16-mixed", "folder": str(tmp_path), "method": method}
    first, _ = group.call("tests.mixins.adapter_file_jobs:save_and_reload", **options)
    assert first["trained"] > 1e-3
    assert first["adapter"] < 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero_2", marks=ZERO)])
def test_a_disk_that_refuses_is_told_on_every_rank(strategy, group, tmp_path):
    answers = group.call("tests.mixins.adapter_file_jobs:fail_to_save", strategy=strategy, folder=str(tmp_path))
    assert answers[0] == answers[1]
    assert len(answers[0]) == (1 if strategy in SHARDED else 2)
    assert all("a file" in told for told in answers[0])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero_2", marks=ZERO)])
def test_strict_loading_is_honoured(strategy, group, tmp_path):
    """Trap F7."""
    answers = group.call("tests.mixins.adapter_file_jobs:strictly_or_not", strategy=strategy, folder=str(tmp_path))
    for strict, loose in answers:
        assert "extra." in strict
        assert loose == [True, True, True]
