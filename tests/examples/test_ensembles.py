"""The example of the three ensembles runs, and what it writes is complete and consistent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick(tmp_path):
    command = [sys.executable, "examples/ensembles/run.py", "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}"})
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "ensembles.json").read_text())
    assert list(found["ensembles"]) == ["initialisations", "cross-validation", "one run"]
    for name, result in found["ensembles"].items():
        assert list(result["rows"]) == ["best single", "weight average", "greedy soup", "prediction ensemble"]
        for scores in result["rows"].values():
            assert all(0 <= scores[metric] <= 1 for metric in ("accuracy", "macro_f1", "calibration_error"))
        average, together = result["accuracy_by_members"].values()
        assert average[0] == together[0] == result["rows"]["best single"]["accuracy"]
        assert together[-1] == result["rows"]["prediction ensemble"]["accuracy"]
        assert result["forward_passes"]["prediction ensemble"] == 2
        assert name in run.stdout
    assert imread(tmp_path / "ensembles.png").shape[1] > 1000
