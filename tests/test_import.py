"""Importing the package is quick, light and free of side effects."""

import json
import subprocess
import sys

import pytest

# Lightning may import an optional package by itself (through torchmetrics); from then on it is made unimportable.
PROBE = """
import json, sys, time, warnings
import lightning
for heavy in ("deepspeed", "transformers", "tokenizers", "matplotlib", "peft"):
    sys.modules[heavy] = None
filters, hook = list(warnings.filters), sys.excepthook
before = time.process_time()
import lightning_tricks
seconds = time.process_time() - before
import lightning_tricks.callbacks, lightning_tricks.cli, lightning_tricks.data, lightning_tricks.engines
import lightning_tricks.mixins, lightning_tricks.recipes, lightning_tricks.storage, lightning_tricks.strategies
from lightning.pytorch.strategies import StrategyRegistry
print(json.dumps({
    "seconds": seconds,
    "flags": [f for f in ("fsdp2", "zero_1", "zero_2", "zero_3") if f in StrategyRegistry],
    "unchanged": filters == warnings.filters and hook is sys.excepthook,
}))
"""


@pytest.fixture(scope="module")
def probe():
    """What a fresh interpreter finds, in which the optional packages cannot be imported."""
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_import_costs_less_than_300_ms_beyond_lightning(probe):
    assert probe["seconds"] < 0.3


def test_import_registers_the_flags_and_changes_nothing_else(probe):
    assert probe["flags"] == ["fsdp2", "zero_1", "zero_2", "zero_3"]
    assert probe["unchanged"]
