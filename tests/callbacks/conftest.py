"""A module whose validation scores are scripted, and Trainers that say nothing."""

import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset


class Scripted(LightningModule):
    """Trains a linear layer; validation logs the score that the script holds for the epoch, and the true loss."""

    def __init__(self, scores=(1.0,), lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)
        self.scores = list(scores)

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        score = -100.0 if self.trainer.sanity_checking else self.scores[min(self.current_epoch, len(self.scores) - 1)]
        self.log("val/score", score, batch_size=4)
        self.log("val/loss", self.loss(batch), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(8, 2, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

    val_dataloader = train_dataloader


class Diary(Callback):
    """Notes the weights at the end of each validation, by epoch."""

    def __init__(self):
        self.weights = {}

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.weights[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.state_dict().items()}


class CrashAfterEpoch(Callback):
    """Kills the fit when this epoch's validation has run."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking and trainer.current_epoch == self.epoch:
            raise KeyError("crash")


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def diary():
    return Diary()


@pytest.fixture
def crash_after_epoch():
    return CrashAfterEpoch


@pytest.fixture
def trainer(tmp_path):
    """Makes a quiet Trainer on one device: `trainer(callbacks, max_epochs=3)`."""

    def make(callbacks, max_epochs=6, **options):
        return Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=callbacks,
            max_epochs=max_epochs,
            **{
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                **options,
            },
        )

    return make


@pytest.fixture
def same_weights():
    """Tells whether two state dicts are equal, bit for bit."""

    def compare(left, right):
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

    return compare


class Heard(logging.Handler):
    """What Lightning's logger lets through, as it does on a user's screen."""

    text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


@pytest.fixture
def told():
    """What a user is told by default, in `told.text`: no level is changed."""
    heard, logger = Heard(), logging.getLogger("lightning.pytorch")
    logger.addHandler(heard)
    yield heard
    logger.removeHandler(heard)
