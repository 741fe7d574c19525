"""A full epoch of a tiny model on eight gloo ranks: every sample once, equally many steps, the same weights."""

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RANKS = 8
SAMPLES = 1003


@pytest.mark.slow
def test_an_epoch_is_a_permutation(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=200, env=environment)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for epoch in (0, 1):
        seen = [one["epochs"][epoch] for one in found]
        assert sorted(sample for rank in seen for batch in rank for sample in batch) == list(range(SAMPLES))
        assert len({len(rank) for rank in seen}) == 1
        assert all(batch for rank in seen for batch in rank)
    assert found[0]["epochs"][0] != found[0]["epochs"][1]
    assert len({one["weights"] for one in found}) == 1


def work(rank, folder):
    """One rank: the process group, two epochs, what they came to."""
    faulthandler.dump_traceback_later(150)  # before the test gives up: where each one is
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    Path(folder, f"{rank}.json").write_text(json.dumps(train()))
    distributed.destroy_process_group()


def train():
    """The model under DDP for two epochs.

    DDP is gone when this returns: it would hold the process group beyond its end, and a group that goes with it waits,
    holding the interpreter, for its thread, which may wait for the interpreter.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from lightning_tricks.data import LengthBucketSampler, TricksDataLoader

    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    lengths = np.random.default_rng(0).integers(1, 90, SAMPLES)
    loader = TricksDataLoader(torch.arange(SAMPLES), sampler=LengthBucketSampler(lengths, max_tokens=300, window=5))
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append([])
        for batch in loader:
            epochs[-1].append(batch.tolist())
            optimizer.zero_grad()
            model(batch[:, None] / SAMPLES).square().mean().backward()
            optimizer.step()
        assert len(epochs[-1]) == len(loader)
    return {"epochs": epochs, "weights": repr([parameter.tolist() for parameter in model.parameters()])}


def main(folder):
    """Each of the eight imports for itself: a fork of a process with threads, as torch's, may wait for one for ever."""
    from torch import multiprocessing

    multiprocessing.start_processes(work, (folder,), RANKS, start_method="spawn")


if __name__ == "__main__":
    main(sys.argv[1])
