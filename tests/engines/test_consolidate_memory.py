"""Consolidating takes memory for a tensor or two, however large the model. Checkpoints of 256 MB."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="not run: needs /proc")]

TENSORS, ELEMENTS = 8, 2**23  # of 32 MB each
MEASURE = """
import sys
from pathlib import Path
import torch
from lightning_tricks.engines import consolidate

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
torch.save({"state_dict": {"w": torch.ones(2)}}, folder / "small.ckpt")
consolidate(folder / "small.ckpt", folder / "small.safetensors")
if (folder / "big.ckpt" / ".metadata").exists():
    import torch.distributed.checkpoint.state_dict_loader
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = peak()
consolidate(folder / "big.ckpt", folder / "big.safetensors")
print(peak() - before)
"""
WRITE = """
import sys
from pathlib import Path
import torch

kind, path, count, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
state = {f"w{index}": torch.full((size // 2, 2), float(index)) for index in range(count)}
if kind == "file":
    torch.save({"state_dict": state}, path)
elif kind == "fsdp2":
    import torch.distributed.checkpoint as dcp
    dcp.save({"state_dict": state}, checkpoint_id=path, no_dist=True)
else:
    (path / "checkpoint").mkdir(parents=True)
    shapes = [{name: value.shape for name, value in state.items()}]
    model = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}}
    vector = torch.cat([value.flatten() for value in state.values()])
    for rank, part in enumerate(vector.chunk(2)):
        states = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [part.clone()]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": states}, path / "checkpoint" / name)
    torch.save(model, path / "checkpoint" / "mp_rank_00_model_states.pt")
"""


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("kind", ["file", "zero", "fsdp2"])
def test_peak_memory_is_a_tensor_or_two(tmp_path, kind):
    python(WRITE, kind, tmp_path / "big.ckpt", TENSORS, ELEMENTS)
    grown = int(python(MEASURE, tmp_path)) / 2**20
    assert (tmp_path / "big.safetensors").stat().st_size > TENSORS * ELEMENTS * 4
    tensor = ELEMENTS * 4 / 2**20
    assert grown < (2 if kind == "fsdp2" else 1) * tensor + 24, (
        f"{kind}: {grown:.0f} MiB for tensors of {tensor:.0f} MiB"
    )
