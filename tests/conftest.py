"""What every test shares: a quiet, offline environment, and GPU tests that say so when they are not run."""

import os

import pytest
import torch

# Set before any test module imports them: no test may reach a hub, and child processes inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items):
    """Report GPU tests as not run, with the machine's lack as the reason, never as passed."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="not run: needs a CUDA device, this machine has none"))
