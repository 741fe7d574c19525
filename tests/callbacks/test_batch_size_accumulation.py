"""BatchSizeAccumulation on one process; ranks are in the matrix."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

import lightning_tricks
from lightning_tricks.callbacks import BatchSizeAccumulation, Constant, LearningRateSchedule, Linear
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.errors import MisconfigurationError
from tests.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Model(L.LightningModule):
    """Twelve batches of four samples; notes at which batches it steps, and with how large a gradient."""

    def __init__(self, loader=None):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
        self.loader, self.stepped, self.rates, self.steps = loader, [], [], 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.batch = (self.current_epoch, batch_idx)
        return self.net(batch).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.stepped.append(self.batch)
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        data = torch.randn(48, 2, generator=torch.Generator().manual_seed(0))
        return self.loader or TricksDataLoader(data, batch_size=4, shuffle=False, seed=0)


def fit(folder, accumulation, *callbacks, module=None, **options):
    module = module or Model()
    trainer = quiet_trainer(folder, [*callbacks, accumulation], **{"max_epochs": 1, **options})
    trainer.fit(module)
    assert trainer.accumulate_grad_batches == 1, "the Trainer is not as it was found"
    return module


def batches(module, epoch=0):
    return [batch for of, batch in module.stepped if of == epoch]


def test_a_target_of_samples(tmp_path):
    assert batches(fit(tmp_path, BatchSizeAccumulation(16))) == [3, 7, 11]
    plain = Model(torch.utils.data.DataLoader(torch.randn(48, 2), batch_size=6))
    assert batches(fit(tmp_path, BatchSizeAccumulation(12), module=plain)) == [1, 3, 5, 7]


def test_a_target_of_tokens(tmp_path):
    assert batches(fit(tmp_path, BatchSizeAccumulation(4096, per_batch=1024))) == [3, 7, 11]


def test_it_is_what_the_trainer_would_do(tmp_path):
    torch.manual_seed(0)
    ours = fit(tmp_path, BatchSizeAccumulation(20))
    torch.manual_seed(0)
    theirs = Model()
    quiet_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=5).fit(theirs)
    assert torch.equal(ours.net.weight, theirs.net.weight)


def test_a_change_waits_until_both_windows_begin(tmp_path):
    module = fit(tmp_path, BatchSizeAccumulation({0: 4, 3: 16, 5: 8}), max_epochs=2)
    assert batches(module) == [0, 1, 2, 3, 7, 9, 11]
    assert batches(module, 1) == [1, 3, 5, 7, 9, 11]


def test_no_batch_is_in_two_steps(tmp_path):
    """With a rate of 0 every step's gradient is the mean of its own batches'."""

    class Gradients(L.Callback):
        def __init__(self):
            self.found = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.found.append(pl_module.net.weight.grad.clone())

    module, gradients = Model(), Gradients()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fit(tmp_path, BatchSizeAccumulation({0: 4, 3: 16, 5: 8}), gradients, module=module)
    inputs, start = list(module.train_dataloader()), 0
    for stop, found in zip(batches(module), gradients.found, strict=True):
        loss = torch.stack([module.net(batch).square().mean() for batch in inputs[start : stop + 1]]).mean()
        torch.testing.assert_close(found, torch.autograd.grad(loss, module.net.weight)[0])
        start = stop + 1


def test_a_resumed_fit_goes_on_with_the_target_in_force(tmp_path):
    target = {0: 8, 2: 12}  # due at batch 4, which is no multiple of 3: in force from batch 6
    torch.manual_seed(0)
    whole = fit(tmp_path, BatchSizeAccumulation(target))

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    torch.manual_seed(0)
    fit(tmp_path, BatchSizeAccumulation(target), Saves())
    resumed = Model()
    trainer = quiet_trainer(tmp_path, [BatchSizeAccumulation(target)], max_epochs=1)
    trainer.fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert batches(whole) == [1, 3, 5, 8, 11]
    assert batches(resumed) == [8, 11]
    assert torch.equal(resumed.net.weight, whole.net.weight)


@pytest.mark.parametrize("first", [True, False])
def test_a_schedule_knows_how_many_steps_there_are(tmp_path, first):
    schedule, accumulation = LearningRateSchedule(Linear()), BatchSizeAccumulation(16)
    order = [schedule, accumulation] if first else [accumulation, schedule]
    module = Model()
    quiet_trainer(tmp_path, order, max_epochs=1).fit(module)
    assert module.rates == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_a_schedule_must_be_told_the_steps_where_targets_change(tmp_path):
    callbacks = [LearningRateSchedule(Constant()), BatchSizeAccumulation({0: 4, 3: 8})]
    with pytest.raises(MisconfigurationError, match="BatchSizeAccumulation changes how many batches each has: pass"):
        quiet_trainer(tmp_path, callbacks).fit(Model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "above 0, got 0"),
        ({"target": 2.5}, "above 0, got 2.5"),
        ({"target": True}, "above 0, got True"),
        ({"target": {}}, "of which the first is 0"),
        ({"target": {10: 4}}, "of which the first is 0"),
        ({"target": {0: 4, -1: 8}}, "of which the first is 0"),
        ({"target": {0: 4, 8: None}}, "above 0, got None"),
        ({"target": 8, "per_batch": 0}, "`per_batch` must be 'auto' or"),
        ({"target": 8, "per_batch": "all"}, "`per_batch` must be 'auto' or"),
    ],
)
def test_options_out_of_range(arguments, message):
    with pytest.raises(MisconfigurationError, match=message):
        BatchSizeAccumulation(**arguments)


def refused(folder, message, *callbacks, module=None, **options):
    module = module or Model()
    trainer = quiet_trainer(folder, callbacks, **options)
    with pytest.raises(MisconfigurationError, match=message):
        trainer.fit(module)
    assert module.steps == 0


def test_a_target_that_cannot_be_met(tmp_path):
    refused(
        tmp_path, r"a `target` of 10 is no multiple of the 4 .* 1 rank\(s\).* take 8 or 12", BatchSizeAccumulation(10)
    )
    refused(tmp_path, "a `target` of 3 is no multiple .* take 4, or", BatchSizeAccumulation({0: 4, 500: 3}))


def test_a_loader_without_a_batch_size(tmp_path):
    module = Model(torch.utils.data.DataLoader([torch.randn(4, 2)] * 3, batch_size=None))
    refused(tmp_path, "has no `batch_size`: pass `per_batch`", BatchSizeAccumulation(8), module=module)


def test_rivals_and_manual_optimisation(tmp_path):
    ours = BatchSizeAccumulation(8)
    words = "both say how many batches are accumulated"
    refused(tmp_path, words, ours, accumulate_grad_batches=2)
    refused(tmp_path, words, ours, GradientAccumulationScheduler({0: 2}))
    module = Model()
    module.automatic_optimization = False
    refused(tmp_path, "which it does not under manual optimisation", ours, module=module)


def test_the_check_within_a_fit_does_not_take_it_for_the_trainers(tmp_path):
    class Asks(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            assert lightning_tricks.check(trainer, pl_module).verdict == "exact"

    fit(tmp_path, BatchSizeAccumulation(8), Asks())


def test_an_error_leaves_the_trainer_as_it_was(tmp_path):
    class Fails(L.Callback):
        def on_train_batch_end(self, *_):
            raise KeyError("stopped")

    trainer = quiet_trainer(tmp_path, [BatchSizeAccumulation(8), Fails()])
    with pytest.raises(KeyError):
        trainer.fit(Model())
    assert trainer.accumulate_grad_batches == 1
