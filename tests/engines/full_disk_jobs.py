"""A disk that fills up while a checkpoint is saved, as jobs that a `Group` runs on every rank."""

import contextlib
import resource
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_tricks.callbacks import CheckpointEnsemble, TopK
from lightning_tricks.engines import engine_of, read_checkpoint
from lightning_tricks.errors import CheckpointError
from tests.engines.checks import Net, Run, loader
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

ROOM = 2000  # bytes of a file before the system refuses the rest: less than any file with weights


@contextlib.contextmanager
def full_disk():
    """The system refuses what goes beyond the first bytes of a file, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Validated(Net):
    def val_dataloader(self):
        return loader(1)

    def validation_step(self, batch, index):
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)


class Saver(L.Callback):
    """Saves under one name after steps 2 and 4, the second time with no room on some ranks."""

    def __init__(self, path: Path, full: bool) -> None:
        self.path, self.full = path, full

    def setup(self, trainer, pl_module, stage):
        engine_of(trainer)  # as any trick does

    def on_train_batch_end(self, trainer, pl_module, *rest):
        with full_disk() if self.full and trainer.global_step == 4 else contextlib.nullcontext():
            if trainer.global_step in (2, 4):
                trainer.save_checkpoint(self.path)


def saved(engine: str, folder: str, ranks: list[int]) -> str:
    """Every rank ends with the same error, and the checkpoint before is whole; then there is room again."""
    run = Run(engine, Path(folder))
    path = run.path("last.ckpt")
    with pytest.raises(CheckpointError) as raised:
        run.trainer(Saver(path, run.rank in ranks), max_epochs=1).fit(Net(batches=6))
    assert read_checkpoint(path)["global_step"] == 2
    assert [item.name for item in path.parent.iterdir() if path.name in item.name] == [path.name]
    trainer = run.trainer(Saver(path, full=False), max_epochs=1)
    trainer.fit(Net(batches=6), ckpt_path=str(path))
    assert read_checkpoint(path)["global_step"] == 4
    return str(raised.value)


class Fill(L.Callback):
    """No room from a hook on."""

    def __init__(self, hook: str) -> None:
        self.room = contextlib.ExitStack()
        setattr(self, hook, lambda *_: self.room.enter_context(full_disk()))


def ensemble(engine: str, folder: str, hook: str) -> str:
    """Members and ensembles that cannot be written end the fit on every rank; nothing half-written stays."""
    run, fill = Run(engine, Path(folder)), Fill(hook)
    place = run.folder / f"{engine}-{hook}"
    callbacks = [fill, CheckpointEnsemble(TopK(1, monitor="val/loss"), dirpath=place)]
    with pytest.raises(CheckpointError) as raised, fill.room:
        run.trainer(*callbacks, max_epochs=1).fit(Validated(batches=2))
    assert not [item for item in place.iterdir() if item.name.startswith((".", "ensemble", "mean"))]
    return str(raised.value)
