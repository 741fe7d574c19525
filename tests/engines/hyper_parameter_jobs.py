"""Hyper-parameters that are no plain types, through a fit, a resume and a reading, as jobs of a `Group`."""

import os
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from lightning_tricks.engines import allow_hyper_parameters, engine_of, inspect_checkpoint, read_checkpoint
from lightning_tricks.errors import CheckpointError
from tests.engines.checks import Net, Probe, Run, fit
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

CONFIG = {"lr": 0.1, "sizes": [1, 2.5, "wide", None, True], "again": "${lr}"}


class Trap:
    """An object whose reading would run something."""

    def __reduce__(self):
        return os.system, ("true",)


class Trick(Probe):
    def setup(self, trainer, pl_module, stage):
        engine_of(trainer)  # as any trick does


class Configured(Net):
    def __init__(self, path: Path, cfg: DictConfig, extra=None) -> None:
        super().__init__(batches=4)
        self.save_hyperparameters()


def survive(engine: str, folder: str) -> None:
    run = Run(engine, Path(folder))
    path, cfg = run.path("configured.ckpt"), OmegaConf.create(CONFIG)
    fit(run, Configured(Path("texts"), cfg), Trick(save=(2, path)), max_epochs=1)
    resumed = fit(run, Configured(Path("texts"), cfg), Trick(), ckpt_path=path, max_epochs=1)
    assert resumed.global_step == 4
    content, facts = read_checkpoint(path), inspect_checkpoint(path)
    assert (facts.step, facts.hyper_parameters[:2]) == (2, ["path", "cfg"])
    found = [content["hyper_parameters"]]
    if path.is_file():
        with allow_hyper_parameters():
            found.append(Configured.load_from_checkpoint(path).hparams)
    for options in found:
        assert (options["path"], options["cfg"], options["cfg"].again) == (Path("texts"), cfg, 0.1)
    Configured(**content["hyper_parameters"]).load_state_dict(content["state_dict"], strict=True)


def stay_out(engine: str, folder: str) -> None:
    """An object of another class is neither read nor resumed from, where the engine allows to refuse it."""
    run = Run(engine, Path(folder))
    path = run.path("trapped.ckpt")
    fit(run, Configured(Path("a"), None, Trap()), Trick(save=(2, path)), max_epochs=1)
    with pytest.raises(CheckpointError, match=r"could run code.*add_safe_globals"):
        read_checkpoint(path)
    if not engine.startswith("zero"):
        with pytest.raises(Exception, match=r"(?i)unsupported global"):
            fit(run, Configured(Path("a"), None), Trick(), ckpt_path=path, max_epochs=1)
