"""examples/streaming.py on files that it makes up."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "streaming.py"


@pytest.mark.slow
def test_it_reports_and_resumes(tmp_path):
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), "--ranks=2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    (waste,) = (float(line.split()[1].rstrip("%")) for line in ran.stdout.splitlines() if line.startswith("waste"))
    assert waste < 5
    assert ran.stdout.endswith("batches: the same batches\n")
