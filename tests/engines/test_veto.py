import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_tricks.engines import engine_of
from lightning_tricks.errors import UnsupportedError
from tests.engines.checks import Net
from tests.engines.test_plain import quiet

pytestmark = pytest.mark.filterwarnings("ignore")


class Vetoer(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine_of(trainer).veto_step(optimizer)


class WithOptimizer(Net):
    def __init__(self, build) -> None:
        super().__init__()
        self.build = build

    def configure_optimizers(self):
        return self.build(self.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.5),
    ],
    ids=["adamw", "fused", "foreach", "sgd", "nadam", "rmsprop", "adafactor"],
)
def test_optimizers_leave_a_vetoed_step_alone(build):
    module = WithOptimizer(build)
    states = []

    class Second(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            states.append(snapshot(module, optimizer))
            if trainer.global_step > 0:
                engine_of(trainer).veto_step(optimizer)

    trainer = quiet(Second(), max_steps=3)
    trainer.fit(module)
    first, second, third = states
    assert not equal(first, second)
    assert equal(second, third)
    assert equal(third, snapshot(module, trainer.optimizers[0]))
    assert not engine_of(trainer).was_step_applied()


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    states = [value for state in optimizer.state.values() for value in state.values() if value is not None]
    return [*weights, *(torch.as_tensor(value).clone() for value in states)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


class Two(L.LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = nn.Linear(6, 1), nn.Linear(6, 1)
        self.applied = []

    def training_step(self, batch, index):
        for optimizer, layer in zip(self.optimizers(), (self.left, self.right), strict=True):
            optimizer.zero_grad()
            self.manual_backward(layer(batch[0]).mean())
            optimizer.step()
            self.applied.append(engine_of(self.trainer).was_step_applied())

    def configure_optimizers(self):
        return [torch.optim.AdamW(layer.parameters(), lr=0.1) for layer in (self.left, self.right)]

    def train_dataloader(self):
        return Net(batches=1).train_dataloader()


def test_a_veto_is_of_one_optimizer():
    class Left(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if optimizer is trainer.optimizers[0]:
                engine_of(trainer).veto_step(optimizer)

    module = Two()
    left, right = (layer.weight.detach().clone() for layer in (module.left, module.right))
    quiet(Left(), max_steps=-1, max_epochs=1).fit(module)
    assert torch.equal(module.left.weight, left)
    assert not torch.equal(module.right.weight, right)
    assert module.applied == [False, True]


def test_other_trainers_steps_are_not_ours():
    class Inner(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            assert not engine_of(trainer).was_step_applied()
            quiet().fit(Net(batches=1))
            assert not engine_of(trainer).was_step_applied()

    quiet(Vetoer(), Inner(), max_steps=1).fit(Net())


def test_lbfgs_is_refused():
    with pytest.raises(UnsupportedError, match="LBFGS: one step evaluates several gradients"):
        quiet(Vetoer()).fit(WithOptimizer(torch.optim.LBFGS))


def test_fused_optimizer_with_a_scaler_is_refused():
    trainer = quiet(Vetoer(), plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    with pytest.raises(UnsupportedError, match=r"fused AdamW .* pass `fused=False`"):
        trainer.fit(WithOptimizer(lambda parameters: torch.optim.AdamW(parameters, fused=True)))


def test_a_fit_that_goes_back_finds_nothing_of_the_fit_before(tmp_path):
    """The same Trainer and optimizer, at the same step number, with other gradients."""

    class Kept(Net):
        scale = 1.0

        def __init__(self) -> None:
            super().__init__(batches=2)
            self.kept = torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, index):
            return super().training_step(batch, index) * self.scale

        def configure_optimizers(self):
            return self.kept

    class Second(L.Callback):
        norms: tuple[float, ...] = ()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.norms += (float(engine_of(trainer).gradient_norm(optimizer)),)
            if trainer.global_step == 1 and pl_module.scale == 1:
                engine_of(trainer).veto_step(optimizer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            if trainer.global_step == 1 and pl_module.scale == 1:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    callback, module = Second(), Kept()
    trainer = quiet(callback, max_epochs=1, max_steps=-1)
    trainer.fit(module)
    module.scale = 16.0
    trainer.fit(module, ckpt_path=tmp_path / "first.ckpt")
    _, before, again = callback.norms
    assert again == 16 * before
    assert engine_of(trainer).was_step_applied()
