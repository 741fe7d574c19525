"""Known traps, as jobs that a `Group` runs on every rank. `test_traps.py` says which trap is where."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_tricks.callbacks import GradientClipping
from lightning_tricks.engines import ranks
from lightning_tricks.errors import MisconfigurationError
from tests.engines.checks import BATCH, Net, Run, float_weights, fp16_options, loader
from tests.engines.option_jobs import prepare, strategy_of
from tests.orders import kept_shuffle

__all__ = ["prepare"]


def equal(found: L.Trainer, expected: L.Trainer, tolerance: float = 0.0) -> None:
    wanted = float_weights(expected)
    for name, value in float_weights(found).items():
        assert (value - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max(), name


def small_norms_stay(engine: str, folder: str) -> None:
    """Loss scale 65536, limit above every norm: the weights of a fit that does not clip."""
    run, weights = Run(engine, Path(folder)), []
    for callbacks in ([GradientClipping(10.0)], []):
        trainer = run.trainer(*callbacks, max_epochs=1, **fp16_options(run))
        trainer.fit(Net(batches=3, optimizer="sgd"))
        weights.append(trainer)
    equal(*weights)


class Large(Net):
    """The batches of four, as one."""

    def train_dataloader(self):
        return kept_shuffle(loader(self.batches).dataset, batch_size=4 * BATCH // ranks()[1], seed=5)


def four_are_one(engine: str, folder: str) -> None:
    """Four batches accumulated, then clipped once: as one batch of their samples."""
    run, fits = Run(engine, Path(folder)), []
    for module, window in ((Net, 4), (Large, 1)):
        trainer = run.trainer(GradientClipping(0.05), max_epochs=1, accumulate_grad_batches=window)
        trainer.fit(module(batches=8, optimizer="sgd"))
        assert trainer.global_step == 2
        fits.append(trainer)
    equal(*fits, tolerance=1e-6)


def configuration_clips_too(engine: str, folder: str) -> None:
    """On every rank, before the first step, naming both."""
    strategy = strategy_of(engine)
    strategy.config["gradient_clipping"] = 0.7
    trainer = Run(engine, Path(folder)).trainer(GradientClipping(0.5), max_epochs=1, strategy=strategy)
    with pytest.raises(MisconfigurationError, match=r"GradientClipping and .*`gradient_clipping: 0.7`.* both clip"):
        trainer.fit(Net(batches=1))
    assert trainer.global_step == 0


class Losses(L.Callback):
    """The loss as the step computed it, and as callbacks get it."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        self.pairs.append((float(outputs["loss"]), float(outputs["whole"])))


class Telling(Net):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return {"loss": loss, "whole": loss.detach()}


def loss_of_callbacks(engine: str, folder: str) -> None:
    """A callback gets the loss divided by the window, on every engine alike, also in a window that is cut short."""
    losses = Losses()
    trainer = Run(engine, Path(folder)).trainer(losses, max_epochs=1, accumulate_grad_batches=4)
    trainer.fit(Telling(batches=6))
    assert len(losses.pairs) == 6
    for given, whole in losses.pairs:
        assert 4 * given == pytest.approx(whole, rel=1e-6)


TEXTS = ["a", "bb", "ccc", "dddd", "a b", "cc d", "e", "ff"]


class Texts(Net):
    """Batches that hold no tensor: a list of strings, or a dictionary of lists of numbers."""

    def __init__(self, kind: str) -> None:
        super().__init__(batches=1)
        self.kind = kind

    def train_dataloader(self):
        mine = TEXTS[ranks()[0] :: ranks()[1]]
        samples = mine if self.kind == "strings" else [{"length": len(text), "text": text} for text in mine]
        return DataLoader(samples, batch_size=len(mine) // 2, collate_fn=self.collate)

    def collate(self, samples):
        if self.kind == "strings":
            return samples
        return {key: [sample[key] for sample in samples] for key in samples[0]}

    def training_step(self, batch, index):
        lengths = batch["length"] if self.kind == "dictionary" else [len(text) for text in batch]
        inputs = torch.tensor(lengths, device=self.device).unsqueeze(1).float().expand(-1, 6)
        loss = nn.functional.cross_entropy(self(inputs).float(), inputs[:, 0].long() % 3)
        self.log("loss", loss, on_epoch=True, batch_size=len(lengths))
        return loss


def no_tensor(engine: str, folder: str, kind: str) -> None:
    """The weights of one device, which writes them."""
    run = Run(engine, Path(folder))
    trainer = run.trainer(max_epochs=2, use_distributed_sampler=False)
    trainer.fit(Texts(kind))
    assert trainer.global_step == 4
    if not run.is_reference or kind == "strings":
        run.compare("no-tensor", {k: v for k, v in float_weights(trainer).items() if k != "offset"}, 1e-4)
