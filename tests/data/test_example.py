"""examples/data.py on a part of the corpus."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "data.py"


def run(folder, *options):
    command = [sys.executable, str(EXAMPLE), *options]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (folder / "runs" / "data" / "report.png").stat().st_size > 1000
    return [line.split() for line in ran.stdout.splitlines()]


def shares(lines, name):
    return [float(line[len(name.split())].rstrip("%")) for line in lines if line[: len(name.split())] == name.split()]


@pytest.mark.slow
def test_it_prints_three_reports_and_writes_a_picture(tmp_path):
    lines = run(tmp_path, "--limit=600", "--max-length=128", "--max-tokens=1024", "--ranks=2")
    wastes = shares(lines, "waste")
    assert len(wastes) == 3
    assert wastes[0] > 2 * max(wastes[1:])


@pytest.mark.slow
def test_the_whole_corpus(tmp_path):
    """As it is run without options; the figures are the goals of the benchmark."""
    lines = run(tmp_path)
    random, fixed, budget = shares(lines, "waste")
    assert random > 50
    assert fixed < 9
    assert budget < 3
    assert shares(lines, "useful share")[2] > 95
