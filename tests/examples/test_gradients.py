"""examples/gradients.py in a quick form: it runs, and writes what it says."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "gradients.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("gradients_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_four_trainings_on_the_same_batches(example, tmp_path, capsys):
    example.main(["--steps", "45", "--output", str(tmp_path)])
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 4
    before = {tuple(values[:39]) for name, values in losses.items() if "no clip" in name}
    assert len(before) == 1
    assert all(len(values) == 45 and values[39] != values[39] for values in losses.values()), "the outlier is noted"
    assert all(values[38] < values[0] for values in losses.values()), "nothing is learned"
    unclipped = losses.pop("no clipping")
    assert all(max(values[40:]) < max(unclipped[40:]) for values in losses.values()), "clipping does not help"
    assert (tmp_path / "losses.png").stat().st_size > 5000
    assert "the loss of the last 50 steps" in capsys.readouterr().out
