"""A DeepSpeed configuration in YAML, as a mapping and as a path."""

import importlib.util

import pytest

from lightning_tricks.cli.training import TricksCLI

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="not run: needs DeepSpeed"),
]
STACKED = """trainer:
  strategy:
    class_path: lightning_tricks.strategies.zero
    init_args:
      config: {config}
      offload: {offload}
"""


@pytest.mark.parametrize(
    ("config", "offload", "device"),
    [
        ("ds.json", "null", None),
        ("ds.json", "/local/nvme", "nvme"),
        ("{zero_optimization: {stage: 3, sub_group_size: 77}, steps_per_print: 9}", "cpu", "cpu"),
    ],
)
def test_a_configuration_in_yaml(project, monkeypatch, config, offload, device):
    monkeypatch.setattr(TricksCLI, "_run_subcommand", lambda self, subcommand: None)
    (project / "ds.json").write_text('{"zero_optimization": {"stage": 3, "sub_group_size": 77}, "steps_per_print": 9}')
    (project / "stacked.yaml").write_text(STACKED.format(config=config, offload=offload))
    light = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    own = ["--model", "own.Net", "--data", "own.Data", "--config", "stacked.yaml"]
    built = TricksCLI(["fit", *light, *own]).trainer.strategy.config
    assert built["steps_per_print"] == 9
    assert (built["zero_optimization"]["stage"], built["zero_optimization"]["sub_group_size"]) == (3, 77)
    assert built["zero_optimization"].get("offload_optimizer", {}).get("device") == device
