"""Checkpoints to combine, and a prediction ensemble, as jobs that a `Group` runs on every rank."""

from pathlib import Path

from lightning_tricks.errors import UnsupportedError
from lightning_tricks.inference import PredictionEnsemble
from tests.engines.checks import Net, Probe, Run, fit, loader
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]


def save(engine: str, folder: str, step: int) -> None:
    """One checkpoint, of as many steps."""
    run = Run(engine, Path(folder))
    fit(run, Net(batches=4), Probe(save=(step, run.path("member.ckpt"))), max_epochs=1)


class Pairs(Net):
    def test_dataloader(self):
        return loader(3)


def tested(engine: str, folder: str, members: list[str]) -> dict[str, float]:
    """The scores of an ensemble."""
    trainer = Run(engine, Path(folder)).trainer()
    return trainer.test(PredictionEnsemble(members, Net), Pairs().test_dataloader(), verbose=False)[0]


def refused(engine: str, folder: str, members: list[str]) -> str:
    """What an engine that cuts modules up says."""
    try:
        tested(engine, folder, members)
    except UnsupportedError as error:
        return str(error)
    return ""
