"""A training script as a user writes it, for launchers: `python -m tests.engines.launched DEVICES NODES OUT FLAG...`.

It asks its environment for nothing: launchers differ there, and the Trainer knows them.
"""

import sys
from pathlib import Path

import torch

from tests.engines.checks import Net, Probe, Run, fit, float_weights
from tests.engines.option_jobs import prepare
from tests.rank_process import leave


def main(devices: str, nodes: str, out: str, flags: list[str]) -> None:
    prepare()
    for flag in flags:
        probe = Probe(limit=0.5)
        options = {"devices": int(devices), "num_nodes": int(nodes), "max_epochs": 1}
        trainer = fit(Run(flag, Path(out)), Net(batches=4), probe, **options)
        weights = float_weights(trainer)
        if trainer.is_global_zero:
            facts = {"ranks": trainer.world_size, "copies": getattr(trainer.strategy, "_replicas", 1)}
            torch.save({"weights": weights, "norms": probe.norms, **facts}, Path(out) / f"{flag}.pt")
    del trainer
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
