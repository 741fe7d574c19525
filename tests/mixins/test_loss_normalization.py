"""LossNormalizationMixin on one process: what it says, refuses and logs. Engines: test_normalization_engines.py."""

import warnings

import lightning as L
import pytest
import torch

import lightning_tricks
from lightning_tricks.callbacks import NonFiniteGuard
from lightning_tricks.errors import DataError, MisconfigurationError, UnsupportedError
from lightning_tricks.mixins import ClassWeightedLossMixin, LossNormalizationMixin
from tests.mixins.models import QUIET, trainer

pytestmark = QUIET


class Model(LossNormalizationMixin, L.LightningModule):
    """`count` samples count in each of the batches of four; what `after` makes of the loss is returned."""

    automatic = True

    def __init__(self, count=4, after=lambda self, loss: loss):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)
        self.count, self.after, self.steps = count, after, 0
        self.automatic_optimization = self.automatic

    def total(self, batch):
        return self.net(batch).square().sum()

    def training_step(self, batch, batch_idx):
        self.steps += 1
        count = self.count(batch_idx) if callable(self.count) else self.count
        return self.after(self, self.normalized_loss(self.total(batch) * (count != 0), count))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(torch.randn(16, 3, generator=generator), batch_size=4)


def fit(module, **options):
    ours = trainer(**{"max_steps": -1, "max_epochs": 1, **options})
    ours.fit(module)
    return ours


def test_without_a_trainer_it_is_a_mean():
    module, batch = Model(), torch.randn(4, 3)
    loss = module.normalized_loss(module.total(batch), 4)
    expected = module.net(batch).square().mean()
    torch.testing.assert_close(loss, expected)
    weight = module.net.weight
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))


def test_nothing_is_zero_with_a_gradient():
    module = Model()
    loss = module.normalized_loss(module.total(torch.zeros(0, 3)), 0)
    loss.backward()
    assert loss == 0
    assert (module.net.weight.grad == 0).all()


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), torch.tensor(-0.5)])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(DataError, match="a `count` that is negative or not finite"):
        Model().normalized_loss(torch.tensor(1.0), count)


@pytest.mark.parametrize("count", [None, True, "3", torch.ones(2)])
def test_a_count_that_is_no_number_is_refused(count):
    with pytest.raises(MisconfigurationError, match="`count` must be one number, got"):
        Model().normalized_loss(torch.tensor(1.0), count)


@pytest.mark.parametrize("loss", [torch.ones(2), torch.tensor(1), 1.0])
def test_a_loss_that_is_no_sum_is_refused(loss):
    with pytest.raises(MisconfigurationError, match=r"`sum_of_losses` must be one floating number, got .*\.sum\(\)"):
        Model().normalized_loss(loss, 1)


def test_a_loss_without_gradient_is_refused_in_training():
    class Detached(Model):
        def total(self, batch):
            return super().total(batch).detach()

    with pytest.raises(MisconfigurationError, match="`sum_of_losses` has no gradient"):
        fit(Detached())


def mixed(self, loss):
    return loss + self.net.weight.square().sum()


def twice(self, loss):
    return loss + self.normalized_loss(self.net.weight.square().sum(), 1)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (mixed, "`training_step` adds something to the normalised loss"),
        (lambda self, loss: loss * self.net.weight.sum(), "adds something"),
        (lambda self, loss: self.net.weight.sum(), "adds something"),
        (twice, "two normalised losses in one training step"),
    ],
)
def test_under_accumulation_a_loss_stands_alone(after, message):
    with pytest.raises(MisconfigurationError, match=message):
        fit(Model(after=after), accumulate_grad_batches=2)


@pytest.mark.parametrize("after", [mixed, twice])
def test_without_accumulation_losses_may_be_mixed(after):
    module, plain = Model(after=after), torch.nn.Linear(3, 1)
    plain.load_state_dict(module.net.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in module.train_dataloader():
        optimizer.zero_grad()
        (plain(batch).square().mean() + plain.weight.square().sum()).backward()
        optimizer.step()
    fit(module)
    torch.testing.assert_close(module.net.weight, plain.weight)


@pytest.mark.parametrize("after", [lambda self, loss: 0.5 * loss, lambda self, loss: {"loss": loss / 2, "more": 1}])
def test_a_multiple_is_as_good(after):
    torch.manual_seed(0)
    half = Model(after=after)
    torch.manual_seed(0)
    whole = Model()
    for group, module in ((0.2, half), (0.1, whole)):
        module.configure_optimizers = lambda module=module, lr=group: torch.optim.SGD(module.parameters(), lr=lr)
        fit(module, accumulate_grad_batches=2)
    torch.testing.assert_close(half.net.weight, whole.net.weight)


def test_windows_without_anything_are_skipped_and_told_once():
    module = Model(count=lambda index: 0)
    before = module.net.weight.detach().clone()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ours = fit(module)
    assert torch.equal(module.net.weight, before)
    assert ours.global_step == 4
    assert sum("The loss of step 0 is a sum over nothing" in str(one.message) for one in warned) == 1


def test_a_fit_that_ends_in_mid_window_leaves_nothing_behind():
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("stopped")

    torch.manual_seed(0)
    module, fresh = Model(), Model()
    fresh.load_state_dict(module.state_dict())
    stopped = trainer(max_steps=-1, max_epochs=1, accumulate_grad_batches=2, callbacks=[Stops()])
    with pytest.raises(KeyError):
        stopped.fit(module)
    assert [type(one).__name__ for one in stopped.callbacks].count("LossWindow") == 0
    module.load_state_dict(fresh.state_dict())
    for one in (module, fresh):
        fit(one, accumulate_grad_batches=4)
    assert torch.equal(module.net.weight, fresh.net.weight)


def test_a_guard_is_told_which_rank_and_the_window_goes():
    def after(self, loss):
        return loss * (float("nan") if self.steps == 3 else 1)

    guard, module = NonFiniteGuard(), Model(after=after)
    fit(module, accumulate_grad_batches=2, callbacks=[guard])
    assert guard.skipped_steps == 1
    assert module.net.weight.isfinite().all()


def test_evaluation_is_the_mean_of_the_batch():
    class Evaluated(Model):
        def validation_step(self, batch, batch_idx):
            self.log("val", self.normalized_loss(self.total(batch).detach(), 4))

        def val_dataloader(self):
            return self.train_dataloader()

    module = Evaluated()
    (found,) = trainer().validate(module, verbose=False)
    expected = torch.stack([module.net(batch).square().mean() for batch in module.train_dataloader()]).mean()
    assert found["val"] == pytest.approx(float(expected.detach()), rel=1e-5)


class ByHand(Model):
    automatic = False


def test_manual_optimisation_is_refused_before_the_first_step():
    module = ByHand()
    with pytest.raises(MisconfigurationError, match="under manual optimisation nobody knows which those are"):
        fit(module)
    assert module.steps == 0


def test_lbfgs_is_refused_before_the_first_step():
    module = Model()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(UnsupportedError, match="LBFGS"):
        fit(module)
    assert module.steps == 0


def test_the_check_knows_it():
    report = lightning_tricks.check(trainer(accumulate_grad_batches=2), Model())
    assert ("LossNormalizationMixin", "exact") in [(found.trick, found.verdict) for found in report]


def test_the_order_of_base_classes_is_held():
    with pytest.raises(MisconfigurationError, match="names LightningModule before LossNormalizationMixin"):
        type("Wrong", (L.LightningModule, LossNormalizationMixin), {})


def test_class_weights_and_manual_optimisation_go_together():
    class Weighted(ClassWeightedLossMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = torch.nn.Linear(3, 2)
            self.weigh_classes([3, 1])

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(self.class_weighted_loss(self.net(batch), (batch[:, 0] > 0).long()))
            self.optimizers().step()

        configure_optimizers = Model.configure_optimizers
        train_dataloader = Model.train_dataloader

    module = Weighted()
    before = module.net.weight.detach().clone()
    fit(module)
    assert not torch.equal(module.net.weight, before)
