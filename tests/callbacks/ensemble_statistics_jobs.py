"""Running statistics of an ensemble's average on every engine, as jobs that a `Group` runs on every rank."""

import torch
from torch.optim.swa_utils import update_bn

from lightning_tricks.callbacks import CheckpointEnsemble, LastK
from lightning_tricks.engines import ranks
from tests.callbacks.averaging_jobs import Normalised, Trail, fit, same
from tests.engines.checks import weights_of
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]


def statistics(engine: str, folder: str) -> None:
    """Torch's `update_bn` over the batches of all ranks gives the same; the fit's own weights are as they were."""
    trail, ensemble = Trail(), CheckpointEnsemble(LastK(2), dirpath=f"{folder}/{engine}")
    options = {"use_distributed_sampler": False, "max_epochs": 3, "val_check_interval": 1.0}
    trainer = fit(engine, folder, Normalised(batches=4), trail, ensemble, **options)
    same(weights_of(trainer), trail.seen[-1], bits=True)  # of the last validation, to which DDP hands rank 0's buffers
    found, members = torch.load(ensemble.path, weights_only=True)["state_dict"], (trail.raw[7], trail.raw[11])
    for name, value in found.items():
        if value.is_floating_point() and "running" not in name:
            assert torch.allclose(value, (members[0][name] + members[1][name]) / 2, rtol=1e-5, atol=1e-7), name
    reference, world = Normalised(batches=4), ranks()[1]
    reference.load_state_dict(found)
    update_bn((batch for rank in range(world) for batch in reference.part(rank, world)), reference)
    for name in ("running_mean", "running_var"):
        value, key = getattr(reference.normalise, name), f"normalise.{name}"
        assert torch.allclose(found[key], value, rtol=1e-4, atol=1e-5), name
        assert not torch.allclose(found[key], (members[0][key] + members[1][key]) / 2, rtol=1e-3), (
            "a mean of statistics"
        )
    assert found["normalise.num_batches_tracked"].dtype == torch.int64
