"""What every benchmark writes down: the commit, the machine, how busy it was, and the figures."""

import json
import os
import platform
import subprocess
from pathlib import Path

from lightning_tricks.cli.demo_report import hardware

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"


def write(path, question, findings, **content):
    """Write a result file and print its findings."""
    head = {"question": question, "commit": commit(), "hardware": hardware(), "load_average": load_average()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **content, "findings": findings}, indent=1) + "\n")
    print(json.dumps(findings, indent=1), f"\nwritten to {path}")


def load_average():
    """Processes that wanted to run in the last 1, 5 and 15 minutes, this benchmark's own included."""
    return [round(value, 2) for value in os.getloadavg()] if platform.system() != "Windows" else None


def commit():
    def git(*arguments):
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=FOLDER)
        return ran.stdout.strip() if ran.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "../lightning_tricks")
    return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")
