"""What the check says of callbacks: those that need a validation, and what cannot be averaged or read back."""

import importlib.util

import pytest
import torch
from lightning.pytorch import LightningModule

import lightning_tricks
from lightning_tricks.callbacks import CheckpointEnsemble, EarlyStopping
from lightning_tricks.errors import MisconfigurationError

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def line(report, name):
    (found,) = [found for found in report if found.trick == name]
    return found


@pytest.mark.parametrize("callback", [EarlyStopping, CheckpointEnsemble])
def test_without_a_validation_it_is_refused(trainer, scripted, callback):
    ours = trainer([callback()], limit_val_batches=0)
    found = line(lightning_tricks.check(ours, scripted()), callback.__name__)
    assert (found.verdict, found.engine) == ("refused", "one_device")
    words = f"{callback.__name__} monitors `val/loss` after each validation, but this fit has none"
    with pytest.raises(MisconfigurationError, match=f"{words}: give it"):
        ours.fit(scripted())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("callback", [EarlyStopping, CheckpointEnsemble])
def test_loaders_that_come_with_the_fit_are_not_known_before(trainer, scripted, callback):
    class Bare(scripted):
        val_dataloader = LightningModule.val_dataloader

    module, data = Bare(), scripted().train_dataloader()
    found = line(lightning_tricks.check(trainer([callback()]), module), callback.__name__)
    assert (found.verdict, found.reason) == ("exact", "it needs a validation dataloader")
    with pytest.raises(MisconfigurationError, match="but this fit has none"):
        trainer([callback()]).fit(module, data)
    trainer([callback()], max_epochs=1).fit(module, data, data)


def test_running_statistics_are_refused(trainer, scripted):
    module = scripted()
    module.norm = torch.nn.BatchNorm1d(2)
    for callback, automatic in ((CheckpointEnsemble(statistics_batches=0), True), (CheckpointEnsemble(), False)):
        module.automatic_optimization = automatic
        found = line(lightning_tricks.check(trainer([callback]), module), "CheckpointEnsemble")
        assert found.verdict == "refused"
        assert "running statistics of `norm` (BatchNorm1d)" in found.reason


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
def test_an_ensemble_is_exact_under_zero(trainer, scripted):
    report = lightning_tricks.check(trainer([CheckpointEnsemble()], strategy="zero_2", devices=1), scripted())
    assert line(report, "CheckpointEnsemble").verdict == "exact"
