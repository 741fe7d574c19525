"""examples/data.py on a part of the corpus."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "data.py"


@pytest.mark.slow
def test_it_prints_three_reports_and_writes_a_picture(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--limit=600", "--max-length=128", "--max-tokens=1024", "--ranks=2"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    wastes = [float(line.split()[1].rstrip("%")) for line in ran.stdout.splitlines() if line.startswith("waste")]
    assert len(wastes) == 3
    assert wastes[0] > 2 * max(wastes[1:])
    assert (tmp_path / "runs" / "data" / "report.png").stat().st_size > 1000
