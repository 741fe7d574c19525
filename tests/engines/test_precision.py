"""A precision that the flag names, beside that of the Trainer."""

import importlib.util

import pytest
from lightning import Trainer
from lightning.pytorch.plugins import DeepSpeedPrecision, MixedPrecision

from lightning_tricks.engines import FSDP2Strategy
from lightning_tricks.errors import MisconfigurationError
from tests.engines.checks import Net

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed")


def build(strategy, **options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(strategy=strategy, accelerator="cpu", devices=1, enable_progress_bar=False, **quiet, **options)


@pytest.mark.parametrize(("flag", "precision"), [("fsdp2_bf16", "bf16-mixed"), ("fsdp2_fp16", "16-mixed")])
def test_the_flag_sets_the_precision(flag, precision):
    trainer = build(flag)
    assert trainer.precision == precision
    assert isinstance(trainer.precision_plugin, MixedPrecision)
    assert trainer.precision_plugin.device == "cpu"
    assert (trainer.scaler is not None) == (precision == "16-mixed")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
@pytest.mark.filterwarnings("ignore:.*supported for historical reasons")
def test_the_trainer_may_say_the_same(precision):
    trainer = build("fsdp2_bf16", precision=precision)
    assert trainer.precision == "bf16-mixed"
    plugin = MixedPrecision("bf16-mixed", "cpu")
    assert build("fsdp2_bf16", plugins=[plugin]).precision_plugin is plugin


@pytest.mark.parametrize("theirs", ["bf16-true", "16-true", "64-true"])
def test_a_trainer_that_says_another_is_refused_with_both(theirs):
    with pytest.raises(
        MisconfigurationError, match=rf"strategy's precision is 'bf16-mixed' .* Trainer's is '{theirs}'"
    ):
        build("fsdp2_bf16", precision=theirs)


def test_the_option_does_what_the_flag_does():
    assert build(FSDP2Strategy(precision="bf16-mixed")).precision == "bf16-mixed"
    assert build(FSDP2Strategy()).precision == "32-true"
    assert build(FSDP2Strategy(), precision="bf16-true").precision == "bf16-true"
    with pytest.raises(MisconfigurationError, match="'bf16-mixed', '16-mixed' or None, got 'bf16'"):
        FSDP2Strategy(precision="bf16")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "precision"), [("bf16", "bf16-mixed"), ("fp16", "16-mixed")])
def test_the_zero_flags_set_it_too(suffix, precision):
    trainer = build(f"zero_2_{suffix}")
    assert trainer.precision == precision
    assert isinstance(trainer.precision_plugin, DeepSpeedPrecision)
    with pytest.raises(MisconfigurationError, match=rf"'{precision}' and the Trainer's is 'bf16-true'"):
        build(f"zero_2_{suffix}", precision="bf16-true")


@pytest.mark.slow
def test_training_computes_in_it(tmp_path):
    """One process suffices: what a layer returns tells its dtype."""
    seen = []
    module = Net(batches=2)
    module.blocks[0].wide.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    build("fsdp2_bf16", max_epochs=1, default_root_dir=tmp_path).fit(module)
    assert {str(dtype) for dtype in seen} == {"torch.bfloat16"}
    assert {str(p.dtype) for p in module.parameters()} == {"torch.float32"}
