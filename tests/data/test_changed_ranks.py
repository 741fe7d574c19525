"""A Trainer on two gloo ranks: whose samplers it leaves alone, and whose mid-epoch checkpoint one device goes on from.

And the other way round. What is recorded are samples: none comes twice, none is lost.
"""

import json
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

SAMPLES, SAVED, EPOCHS = 300, 6, 2
LIMITS = {"plain": 6, "fixed": 6, "buckets": 120, "balanced": 120, "fixed stream": 6, "stream": 120}  # on two ranks
WORKERS = {"buckets": 4, "stream": 2}  # of the two ranks, when they go on

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def order_of(name, limit):
    """A sampler of that name, None for the loader's own order."""
    from lightning_tricks.data import ClassBalancedSampler, IterableSource, LengthBucketSampler, StreamingSampler

    lengths = 1 + np.arange(SAMPLES) * 7 % 40
    source = IterableSource([range(first, first + 50) for first in range(0, SAMPLES, 50)])
    if name == "fixed":
        return LengthBucketSampler(lengths, batch_size=limit, window=5)
    if name == "buckets":
        return LengthBucketSampler(lengths, max_tokens=limit, window=5)
    if name == "balanced":
        within = LengthBucketSampler(lengths, max_tokens=limit, window=5)
        return ClassBalancedSampler((np.arange(SAMPLES) % 5 == 0).astype(int), strategy="square_root", within=within)
    if name == "fixed stream":
        return StreamingSampler(source, lengths, batch_size=limit, window=5, buffer=20)
    if name == "stream":
        return StreamingSampler(source, lengths, max_tokens=limit, window=5, buffer=20)
    return None


def fit(folder, name, limit, world, resume=None, workers=0):
    """The samples of each batch of this rank; the checkpoint after `SAVED` steps is `{name}-{world}.ckpt`."""
    import lightning as L
    import torch

    from lightning_tricks.data import TricksDataLoader
    from tests.rank_process import start_method
    from tests.trainers import quiet_trainer

    class Spy(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch):
            self.seen.append(batch.tolist())
            return self.layer(batch[:, None] / SAMPLES).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == SAVED and resume is None:
                trainer.save_checkpoint(folder / f"{name}-{world}.ckpt")

    sampler, data = order_of(name, limit), torch.arange(SAMPLES)
    order = {"batch_size": limit, "shuffle": True, "seed": 1} if sampler is None else {"sampler": sampler}
    loader = TricksDataLoader(data, num_workers=workers, multiprocessing_context=start_method(workers), **order)
    module = Spy()
    run = quiet_trainer(
        folder, [Save()], devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=EPOCHS, limit_val_batches=0
    )
    run.fit(module, loader, ckpt_path=resume)
    return {"seen": module.seen, "length": run.num_training_batches, "rank": run.global_rank}


def two_ranks(folder):
    found = {}
    for name, limit in LIMITS.items():
        found[name] = {
            "whole": fit(folder, name, limit, 2),
            "resumed": fit(folder, name, limit, 2, folder / f"{name}-1.ckpt", WORKERS.get(name, 0)),
        }
    Path(folder, f"{found['plain']['whole']['rank']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name, the whole run and the resumed one: of one device, and of each of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    one = {name: {"whole": fit(folder, name, 2 * limit, 1)} for name, limit in LIMITS.items()}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=280)
    two = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]
    for name, limit in LIMITS.items():
        one[name]["resumed"] = fit(folder, name, limit, 1, folder / f"{name}-2.ckpt")  # as large batches, and more
    return one, two


def drawn(name, epoch):
    """The samples of an epoch."""
    return sorted(order_of(name, 120).draw(epoch).tolist()) if name == "balanced" else list(range(SAMPLES))


def epochs_of(ranks, first=0):
    """The samples of each epoch, on all ranks together; `first` steps of the first one came before."""
    length = ranks[0]["length"]
    assert {len(rank["seen"]) for rank in ranks} == {EPOCHS * length - first}
    bounds = [0, *(epoch * length - first for epoch in range(1, EPOCHS + 1))]
    return [list(chain(*(batch for rank in ranks for batch in rank["seen"][a:b]))) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("name", LIMITS)
def test_a_trainer_on_two_ranks_takes_the_sampler_s_batches(runs, name):
    """Not those of a DistributedSampler that Lightning put in its place."""
    ranks = [rank[name]["whole"] for rank in runs[1]]
    sampler = order_of(name, LIMITS[name])
    for epoch, seen in enumerate(epochs_of(ranks)):
        assert sorted(seen) == drawn(name, epoch)
        if sampler is None:
            continue
        sampler.set_epoch(epoch)
        plan = sampler.plan(2, LIMITS[name])
        assert ranks[0]["length"] == len(plan)
        for rank in ranks:
            steps = rank["seen"][epoch * len(plan) : (epoch + 1) * len(plan)]
            assert steps == [plan.part(step, rank["rank"], 2).tolist() for step in range(len(plan))]


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_an_epoch_goes_on_on_other_ranks(runs, name, before, after):
    ranks = {1: [runs[0][name]], 2: [rank[name] for rank in runs[1]]}
    seen = chain(*(batch for rank in ranks[before] for batch in rank["whole"]["seen"][:SAVED]))
    first, *later = epochs_of([rank["resumed"] for rank in ranks[after]], SAVED)
    assert sorted([*seen, *first]) == drawn(name, 0)
    for epoch, found in enumerate(later, 1):
        assert sorted(found) == drawn(name, epoch)


if __name__ == "__main__":
    from tests.rank_process import leave

    two_ranks(Path(sys.argv[1]))
    leave()
