"""Manual optimisation, several optimizers and closures, as jobs that a `Group` runs on every rank."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.callbacks import GradientClipping
from lightning_tricks.engines import engine_of
from lightning_tricks.errors import UnsupportedError
from tests.engines.checks import Net, Run, float_weights, fp16_options
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

TOLERANCE = 2e-5  # of a tensor's largest value: ranks sum in another order than one device


class Manual(Net):
    """Steps by hand after every `window` batches. With `two`, head and body have an optimizer each."""

    def __init__(self, window: int = 1, two: bool = False) -> None:
        super().__init__(batches=6)
        self.automatic_optimization = False
        self.window, self.two = window, two

    def training_step(self, batch, index):
        self.manual_backward(self.loss(*batch) / self.window)
        if (index + 1) % self.window == 0:
            for optimizer in self.all_optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def loss(self, inputs, targets):
        return nn.functional.cross_entropy(self(inputs).float(), targets)

    def all_optimizers(self):
        return self.optimizers() if self.two else [self.optimizers()]

    def configure_optimizers(self):
        if not self.two:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        body = [*self.enter.parameters(), *self.blocks.parameters()]
        return [torch.optim.SGD(body, lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)]


class Inside(Manual):
    """All backwards of a window within one `training_step`, each of a part of the batch."""

    def training_step(self, batch, index):
        for inputs, targets in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
            self.manual_backward(self.loss(inputs, targets) / 2)
        self.optimizers().step()
        self.optimizers().zero_grad()


class Closure(Manual):
    """Zeroes the gradients first, and computes them within `step(closure)`."""

    def training_step(self, batch, index):
        def closure():
            self.manual_backward(self.loss(*batch))

        self.optimizers().zero_grad()
        self.optimizers().step(closure)


class Toggled(Manual):
    """Each optimizer alone requires gradients, and has a forward and a backward of its own."""

    def training_step(self, batch, index):
        for optimizer in self.all_optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(*batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


class Lbfgs(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Dropping(Manual):
    """Gives the gradients of its first two batches up."""

    def training_step(self, batch, index):
        self.manual_backward(self.loss(*batch))
        if index > 1:
            self.optimizers().step()
        if index > 0:
            self.optimizers().zero_grad()


MODULES = {
    "every batch": Manual,
    "window over batches": lambda: Manual(window=3),
    "window in one batch": Inside,
    "closure": Closure,
    "toggled": Toggled,
    "two": lambda: Manual(two=True),
    "two, window": lambda: Manual(two=True, window=3),
    "two, toggled": lambda: Toggled(two=True),
    "dropping": Dropping,
    "lbfgs": lambda: Lbfgs(batches=3),
}


class Norms(L.Callback):
    """The norm of each step, as the engine says, and whether it was applied; drops those of `vetoed`."""

    def __init__(self, vetoed: tuple[int, ...] = ()) -> None:
        self.vetoed = vetoed
        self.norms: list[float] = []
        self.asked: list[bool] = []

    def setup(self, trainer, pl_module, stage):
        engine_of(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine = engine_of(trainer)
        self.asked.append(engine.is_optimizer_step())
        if len(self.norms) in self.vetoed:
            engine.veto_step(optimizer)
        self.norms.append(float(engine.gradient_norm(optimizer)))


def equals_one_device(engine: str, folder: str, module: str, clip: float | None, flag: str | None = None) -> None:
    """Weights and norms of one device, which writes them."""
    run, norms = Run(engine, Path(folder)), Norms()
    clipping = [] if clip is None else [GradientClipping(clip)]
    torch.manual_seed(0)
    built = MODULES[module]()
    trainer = run.trainer(norms, *clipping, max_epochs=1, **({} if flag is None else {"strategy": flag}))
    trainer.fit(built)
    assert all(norms.asked)
    assert trainer.global_step == len(norms.norms)
    start = MODULES[module]().state_dict()
    values = {name: value for name, value in float_weights(trainer).items() if name != "offset"}
    assert not any(torch.equal(value, start[name]) for name, value in values.items())
    name = f"{module}-{clip}"
    run.compare(name, values, TOLERANCE)
    run.compare(f"{name}-norms", {"norms": torch.tensor(norms.norms)}, TOLERANCE)


def limits_of_each(engine: str, folder: str, scaled: bool) -> None:
    """Each optimizer's parameters move by their own limit, however far the gradients of the other one go."""
    run, limit = Run(engine, Path(folder)), 0.01
    options = fp16_options(run) if scaled else {}
    trainer = run.trainer(GradientClipping(limit), max_epochs=1, limit_train_batches=1, **options)
    trainer.fit(Manual(two=True))
    start, end = Net().state_dict(), float_weights(trainer)
    moved = {name: end[name] - start[name] for name in end if name != "offset"}
    for head in (True, False):
        length = torch.cat([value.flatten() for name, value in moved.items() if (name[:4] == "head") == head]).norm()
        assert length == pytest.approx(0.1 * limit, rel=1e-3)


def vetoes_of_each(engine: str, folder: str) -> None:
    """A veto of one optimizer's steps leaves its parameters alone, and the other one's train as ever."""
    run = Run(engine, Path(folder))
    trainer = run.trainer(Norms(vetoed=(0,)), max_epochs=1, limit_train_batches=1)
    trainer.fit(Manual(two=True))
    start, end = Net().state_dict(), float_weights(trainer)
    for name in dict(Net().named_parameters()):
        assert torch.equal(end[name], start[name]) == (not name.startswith("head")), name


def as_automatic(engine: str, folder: str, precision: str) -> None:
    """Accumulated by hand or by the Trainer: the same weights, also where gradients are kept at another precision."""
    run = Run(engine, Path(folder))
    options = fp16_options(run) if precision == "16" else {"precision": precision}
    by_trainer = run.trainer(Norms(), max_epochs=1, accumulate_grad_batches=3, **options)
    by_trainer.fit(Net(batches=6))
    by_hand = run.trainer(Norms(), max_epochs=1, **options)
    by_hand.fit(Manual(window=3))
    expected = float_weights(by_trainer)
    for name, value in float_weights(by_hand).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def refused(engine: str, folder: str, module: str, match: str) -> None:
    """Before the first step, on this rank."""
    trainer = Run(engine, Path(folder)).trainer(max_epochs=1)
    with pytest.raises(UnsupportedError, match=match):
        trainer.fit(MODULES[module]())
    assert trainer.global_step == 0
