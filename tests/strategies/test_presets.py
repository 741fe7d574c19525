import importlib.util

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from lightning_tricks.engines import FSDP2Strategy, ZeroStrategy
from lightning_tricks.strategies import PRESETS, flags, fsdp2, register, zero

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed")


def test_every_flag_is_registered_with_its_line():
    assert set(PRESETS) < set(flags())
    for flag, preset in flags().items():
        assert StrategyRegistry[flag]["description"] == preset.doc
        assert StrategyRegistry[flag]["init_params"] == preset.arguments


@pytest.mark.parametrize("flag", PRESETS)
def test_every_preset_has_a_flag_for_each_precision(flag):
    for suffix, precision in {"bf16": "bf16-mixed", "fp16": "16-mixed"}.items():
        preset = flags()[f"{flag}_{suffix}"]
        assert preset.function is PRESETS[flag].function
        assert preset.arguments == {**PRESETS[flag].arguments, "precision": precision}
        assert precision in preset.doc


def test_registering_again_changes_nothing():
    before = dict(StrategyRegistry)
    register()
    assert dict(StrategyRegistry) == before


def test_the_fsdp2_flag_builds_the_strategy():
    assert isinstance(StrategyRegistry.get("fsdp2"), FSDP2Strategy)
    assert fsdp2(shard=("A", "B")).shard == ("A", "B")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_zero_flags_build_their_stage(stage):
    strategy = StrategyRegistry.get(f"zero_{stage}")
    assert isinstance(strategy, ZeroStrategy)
    assert strategy.config["zero_optimization"]["stage"] == stage
    assert not strategy.handles_gradient_accumulation


@needs_deepspeed
@pytest.mark.slow
def test_bucket_size_is_passed_on():
    assert zero(stage=1, bucket_size=4096).bucket_size == 4096
