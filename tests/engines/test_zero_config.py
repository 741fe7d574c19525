"""A DeepSpeed configuration against the options of `zero()`: everything that needs no second process."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.strategies import zero

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed"),
]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("PL_DEEPSPEED_CONFIG_PATH", raising=False)
    monkeypatch.delenv("LIGHTNING_TRICKS_NVME", raising=False)


def sections(**zero_optimization):
    return {"zero_optimization": zero_optimization}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (sections(stage=2), {"stage": 3}, r"`zero_optimization.stage` to 2, but `stage` is 3: leave one of them out"),
        (sections(reduce_bucket_size=5e8), {"bucket_size": 1000}, r"reduce_bucket_size` to 500000000.0, .* is 1000"),
        (sections(allgather_bucket_size=7), {"bucket_size": 8}, r"allgather_bucket_size` to 7, but `bucket_size` is 8"),
        (
            sections(offload_optimizer={"device": "none"}),
            {"offload": "cpu"},
            r"offload_optimizer.device` to \"none\", but `offload` is 'cpu'",
        ),
        (
            sections(stage=3, offload_param={"device": "nvme", "nvme_path": "/a"}),
            {"offload": "cpu"},
            r"offload_param.device` to \"nvme\", but `offload` is 'cpu'",
        ),
        (
            sections(stage=3, offload_param={"device": "nvme", "nvme_path": "/a"}),
            {"offload": Path("/b")},
            r"offload_param.nvme_path` to \"/a\", but `offload` is '/b'",
        ),
        (
            sections(stage=2, offload_param={"device": "cpu"}),
            {},
            r"offload_param.device` to \"cpu\", but the stage.* is 2",
        ),
        (sections(stage=3, offload_param={"device": "nvme"}), {}, "to 'nvme' and no `nvme_path`: name the folder"),
        (sections(offload_optimizer={"device": "disk"}), {}, "to 'disk': it is 'none', 'cpu' or 'nvme'"),
        (
            {"fp16": {"enabled": True}},
            {"precision": "bf16-mixed"},
            r"`fp16.enabled` to true, but `precision` is 'bf16-",
        ),
        (
            {"bf16": {"enabled": False}},
            {"precision": "bf16-mixed"},
            r"`bf16.enabled` to false, but `precision` is 'bf1",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {}, r"`fp16.enabled` to true, but `bf16.enabled` is"),
        (sections(stage=0), {}, "`stage` must be 1, 2 or 3, got 0"),
        (sections(cpu_offload=True), {}, r"cpu_offload`, which DeepSpeed has given up: write `offload_optimizer: {"),
        ({"zero_optimization": True}, {}, "sets `zero_optimization` to True: it must be an object"),
        ({"checkpoint": {"load_universal": True}}, {}, "sets `checkpoint.load_universal`, which .* leave it out"),
        ({"managed_gradient_accumulation": False}, {}, "sets `managed_gradient_accumulation`, which .* leave it out"),
        (["stage", 3], {}, r"`config` must be a dict or the path of a JSON file, got \['stage', 3\]"),
    ],
)
def test_contradictions_name_both_values(config, options, message):
    with pytest.raises(MisconfigurationError, match=message):
        zero(config=config, **options)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (sections(stage=3), {"stage": 3}),
        (sections(stage="auto"), {"stage": 3}),
        (sections(reduce_bucket_size=512.0), {"bucket_size": 512}),
        (sections(reduce_bucket_size="auto"), {"bucket_size": 512}),
        (sections(offload_optimizer={"device": "cpu"}), {"offload": "cpu"}),
        (sections(offload_optimizer={"device": "auto", "ratio": 1.0}), {"offload": "cpu"}),
        ({"bf16": {"enabled": True}}, {"precision": "bf16-mixed"}),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}, {"precision": "bf16-mixed"}),
    ],
)
def test_what_agrees_or_is_auto_passes(config, options):
    assert "auto" not in json.dumps(zero(config=config, **options).config)


def test_the_rest_reaches_deepspeed_over_the_presets_own():
    own = {"steps_per_print": 7, "a_new_section": {"key": [1, {"deep": 2}]}, "aio": {"queue_depth": 99}}
    config = sections(stage=3, offload_optimizer={"device": "cpu", "buffer_count": 6}) | own
    before = copy.deepcopy(config)
    strategy = zero(config=config)
    strategy.config["a_new_section"]["key"][1]["deep"] = 3
    strategy.config["zero_optimization"]["offload_optimizer"]["buffer_count"] = 5
    assert config == before
    found, preset = zero(config=config).config, zero(stage=3, offload="cpu").config
    assert {name: found[name] for name in ("steps_per_print", "a_new_section")} == {
        name: own[name] for name in ("steps_per_print", "a_new_section")
    }
    assert found["aio"] == preset["aio"] | {"queue_depth": 99}
    wanted = preset["zero_optimization"]["offload_optimizer"] | {"buffer_count": 6}
    assert found["zero_optimization"]["offload_optimizer"] == wanted
    assert "offload_param" not in found["zero_optimization"]
    assert found["zero_allow_untested_optimizer"]


def test_the_stage_is_the_options_the_configurations_or_two():
    stages = [zero().config, zero(stage=1).config, zero(config=sections(stage=3)).config, zero(config={}).config]
    assert [config["zero_optimization"]["stage"] for config in stages] == [2, 1, 3, 2]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file(tmp_path, kind):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    assert zero(config=kind(path)).zero_stage_3
    with pytest.raises(MisconfigurationError, match=r"ds\.json sets `zero_optimization.stage` to 3, but `stage` is 2"):
        zero(stage=2, config=kind(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"stage": 3,}', r"ds\.json is no valid JSON: .*line 1 column"),
        (b'{"stage": 3, "stage": 2}', r"ds\.json is no valid JSON: the key `stage` occurs twice"),
        (b"\xff\xfe{}", r"ds\.json is no valid JSON: .*utf-8"),
        (b"[1]", r"ds\.json must hold a JSON object, got \[1\]"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(MisconfigurationError, match=message):
        zero(config=path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MisconfigurationError, match=r"none\.json cannot be read \(No such file"):
        zero(config=tmp_path / "none.json")
    with pytest.raises(MisconfigurationError, match=r"cannot be read \(Is a directory"):
        zero(config=tmp_path)


def test_lightnings_environment_variable_is_held_against_the_flag(tmp_path, monkeypatch):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "steps_per_print": 7}')
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", f"{path}")
    assert zero(stage=3).config["steps_per_print"] == 7
    with pytest.raises(MisconfigurationError, match=r"PL_DEEPSPEED_CONFIG_PATH=.*ds\.json sets .*stage` to 3"):
        zero(stage=2)
    assert not zero(stage=2, config={}).zero_stage_3


def test_precision_of_trainer_and_configuration():
    import lightning as L

    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(strategy=zero(config={"bf16": {"enabled": True}}), **options)
    assert trainer.precision == "bf16-mixed"
    with pytest.raises(MisconfigurationError, match=r"config=.*`bf16.enabled`\) is 'bf16-mixed' and the .* '16-mixed'"):
        L.Trainer(strategy=zero(config={"bf16": {"enabled": True}}), precision="16-mixed", **options)
