"""Averaging takes memory for a few tensors, however many and large the members, and reads each of them once."""

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="not run: needs /proc")]

TENSORS, ELEMENTS = 8, 2**21  # of 8 MB each
MEASURE = """
import sys
from pathlib import Path
from lightning_tricks.inference import average_checkpoints

def number(file, name):
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

folder, count = Path(sys.argv[1]), int(sys.argv[2])
average_checkpoints([folder / "0.ckpt"], folder / "warm.ckpt")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, read = number("status", "VmHWM"), number("io", "rchar")
average_checkpoints([folder / f"{place}.ckpt" for place in range(count)], folder / "mean.ckpt")
print(number("status", "VmHWM") - before, number("io", "rchar") - read)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    for place in range(6):
        state = {f"w{index}": torch.full((ELEMENTS,), float(place)) for index in range(TENSORS)}
        torch.save({"state_dict": state}, folder / f"{place}.ckpt")
    return folder


def measure(folder, count):
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, f"{folder}", f"{count}"]
    grown, read = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
    return int(grown) / 1024, int(read) / 2**20


def test_memory_does_not_grow_with_the_members_and_each_is_read_once(folder):
    tensor, size = ELEMENTS * 4 / 2**20, TENSORS * ELEMENTS * 4 / 2**20
    for count in (2, 6):
        grown, read = measure(folder, count)
        assert grown < tensor + 32, f"{count} members: {grown:.0f} MiB for tensors of {tensor:.0f} MiB"
        assert count * size <= read < count * size + 4, f"{count} members: {read:.0f} MiB were read"
