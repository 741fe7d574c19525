"""Hybrid sharding, as jobs that a `Group` runs on every rank: the checks of `checks.py`, and what is its own."""

from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_tricks.engines import FSDP2Strategy, engine_of
from lightning_tricks.errors import MisconfigurationError
from tests.engines import checks
from tests.engines.checks import Net, OwnSharding, Probe, Run, fit, weights_of
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]


class Hybrid(Run):
    """On `nodes` machines, a copy of the model on each; on one, a copy for each of two groups of ranks."""

    def __init__(self, folder: str, nodes: int = 1) -> None:
        super().__init__("fsdp2", Path(folder))
        self.nodes = nodes

    def trainer(self, *callbacks: L.Callback, **options) -> L.Trainer:
        strategy = "hsdp" if self.nodes > 1 else FSDP2Strategy(replicate=2)
        here = {"strategy": strategy, "devices": self.world // self.nodes, "num_nodes": self.nodes}
        return super().trainer(*callbacks, **{**here, **options})


def reference(folder: str, names: list[str]) -> None:
    """What one device does in these checks, for the others to compare with."""
    for name in names:
        getattr(checks, name)(Run("one_device", Path(folder)))


def check(folder: str, name: str, nodes: int = 1) -> None:
    getattr(checks, name)(Hybrid(folder, nodes))


def laid_out(folder: str, nodes: int = 1) -> None:
    """Two copies, each cut over the ranks that follow one another; the copies equal bit for bit after training."""
    run = Hybrid(folder, nodes)
    trainer = fit(run, Net(batches=4), Probe(limit=0.5), max_epochs=1)
    shards = run.world // 2
    weight = trainer.lightning_module.enter.weight
    assert weight.device_mesh.mesh.tolist() == [list(range(shards)), list(range(shards, 2 * shards))]
    rows = [6, 5] if shards == 2 else [11]
    assert weight.to_local().shape == (rows[run.rank % shards], 6)
    assert trainer.distributed_sampler_kwargs == {"num_replicas": run.world, "rank": run.rank}
    for name, value in weights_of(trainer).items():
        for rank in range(run.world):
            assert torch.equal(value, engine_of(trainer).broadcast(value, rank)), (name, rank)


def other_replicas(folder: str) -> None:
    """Saved with two copies and resumed with one, and the reverse."""
    run = Hybrid(folder)
    for saved, resumed in ((2, 1), (1, 2)):
        path = run.path(f"{saved}.ckpt")
        options = {"max_epochs": 1, "strategy": FSDP2Strategy(replicate=saved)}
        expected = weights_of(fit(run, Net(batches=6), Probe(save=(3, path)), **options))
        options["strategy"] = FSDP2Strategy(replicate=resumed)
        for name, value in weights_of(fit(run, Net(batches=6), Probe(), ckpt_path=path, **options)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def refusals(folder: str) -> None:
    """On every rank, before the first step."""
    run, probe = Hybrid(folder), Probe()
    with pytest.raises(MisconfigurationError, match=r"`replicate=3` does not divide the 2 ranks .* choose 1 or 2\."):
        fit(run, Net(batches=1), probe, max_epochs=1, strategy=FSDP2Strategy(replicate=3))
    with pytest.raises(MisconfigurationError, match=r"OwnSharding is sharded already.*replicate=2"):
        fit(run, OwnSharding(batches=1), probe, max_epochs=1)
    module = Net(batches=1)
    fit(run, module, Probe(), max_epochs=1)
    with pytest.raises(MisconfigurationError, match=r"Net is sharded already.*replicate=1"):
        fit(run, module, probe, max_epochs=1, strategy="fsdp2")
    assert probe.norms == []
