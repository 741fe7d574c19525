"""examples/peft.py in its quick form: every way trains and is told of, and what is finished is not done again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "peft.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("peft_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_way_is_tried_and_finished_ones_are_kept(example, tmp_path, capsys):
    arguments = ["--quick", "--seeds", "0", "--output", str(tmp_path)]
    example.main([*arguments, "--methods", "LoRA", "head alone"])
    (kept,) = tmp_path.glob("LoRA_0.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "cpu_seconds": 12345.0}))
    example.main(arguments)
    found = json.loads((tmp_path / "peft.json").read_text())
    assert set(found["findings"]) == set(example.WAYS)
    rows = found["findings"]
    assert rows["LoRA"]["cpu_seconds"] == 12345.0, "it was done again"
    assert all(0 <= row["macro_f1"]["mean"] <= 1 and row["checkpoint_bytes"] > 0 for row in rows.values())
    assert rows["head alone"]["trained"] == 3 * 384 + 3
    assert rows["LoRA q, v"]["trained"] == rows["head alone"]["trained"] + 6 * 2 * 8 * 2 * 384
    assert rows["QLoRA"]["trained"] == rows["LoRA"]["trained"] < rows["DoRA"]["trained"] < rows["everything"]["trained"]
    assert rows["everything"]["checkpoint_bytes"] > 50 * rows["LoRA"]["checkpoint_bytes"]
    assert (tmp_path / "peft.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert all(way in shown for way in example.WAYS)
