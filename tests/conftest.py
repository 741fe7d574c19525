"""What every test shares: a quiet, offline environment, and GPU tests that say so when they are not run."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

# Set before any test module imports them: no test may reach a hub, and child processes inherit it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Thousands of checkpoints are flushed to the disk: one in memory, where there is one with room, saves half the time.
MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ["TMPDIR"], tempfile.tempdir = str(MEMORY), None


# What Lightning puts into the environment, where a later process would take it for its own.
LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SEEDED = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@pytest.fixture(autouse=True)
def no_process_group_left():
    """End the process group that a fit in this very process started, so that later tests see one device."""
    before = {name: os.environ.get(name) for name in (*LAUNCHED, *SEEDED)}
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def pytest_collection_modifyitems(items):
    """Report GPU tests as not run, with the machine's lack as the reason, never as passed."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="not run: needs a CUDA device, this machine has none"))
