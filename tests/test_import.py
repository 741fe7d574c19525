"""Importing the package is quick, light and free of side effects."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time, warnings
import lightning
filters, hooks = list(warnings.filters), sys.excepthook
before = time.process_time()
import lightning_tricks
seconds = time.process_time() - before
import lightning_tricks.callbacks, lightning_tricks.data, lightning_tricks.engines, lightning_tricks.mixins
import lightning_tricks.storage, lightning_tricks.strategies
from lightning.pytorch.strategies import StrategyRegistry
print(json.dumps({
    "seconds": seconds,
    "heavy": [m for m in ("deepspeed", "transformers", "matplotlib", "peft") if m in sys.modules],
    "flags": [f for f in ("fsdp2", "zero_1", "zero_2", "zero_3") if f in StrategyRegistry],
    "unchanged": filters == warnings.filters and hooks is sys.excepthook,
}))
"""


@pytest.fixture(scope="module")
def probes():
    runs = [subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True) for _ in range(3)]
    return [json.loads(run.stdout.splitlines()[-1]) for run in runs]


def test_import_costs_less_than_300_ms_beyond_lightning(probes):
    assert min(probe["seconds"] for probe in probes) < 0.3


def test_import_leaves_optional_packages_alone(probes):
    assert probes[0]["heavy"] == []


def test_import_registers_the_flags_and_changes_nothing_else(probes):
    assert probes[0]["flags"] == ["fsdp2", "zero_1", "zero_2", "zero_3"]
    assert probes[0]["unchanged"]
