"""LearningRateSchedule on one process: rates against torch's, what it refuses; engines are in the matrix."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

import lightning_tricks
from lightning_tricks.callbacks import (
    Constant,
    Cosine,
    InverseSquareRoot,
    LearningRateSchedule,
    Linear,
    WarmupStableDecay,
)
from lightning_tricks.engines import engine_of
from lightning_tricks.errors import MisconfigurationError
from tests.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Model(L.LightningModule):
    """Eight batches; notes the rate of each optimizer step; steps in `bad` are vetoed."""

    def __init__(self, bad=(), own=None):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
        self.bad, self.own, self.rates, self.steps = bad, own, [], 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.net(batch).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        if self.global_step in self.bad:
            engine_of(self.trainer).veto_step(optimizer)

    def configure_optimizers(self):
        groups = [{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.2}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return optimizer if self.own is None else ([optimizer], [self.own(optimizer)])

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(torch.randn(16, 2, generator=generator), batch_size=2)


def fit(folder, schedule, module=None, **options):
    module = module or Model()
    quiet_trainer(folder, [schedule], **{"max_epochs": 2, **options}).fit(module)
    return module


def shares(module):
    """The share of the highest rate, which both groups have."""
    first, second = ([rates[group] / highest for rates in module.rates] for group, highest in ((0, 0.1), (1, 0.2)))
    assert first == pytest.approx(second)
    return first


@pytest.mark.parametrize(
    ("policy", "after"),
    [
        (Constant(), [1.0] * 12),
        (Linear(end=0.5), [1 - 0.5 * step / 12 for step in range(12)]),
        (WarmupStableDecay(decay=0.25), [1.0] * 10 + [2 / 3, 1 / 3]),
        (InverseSquareRoot(timescale=4), [(4 / (4 + step)) ** 0.5 for step in range(12)]),
    ],
)
def test_warm_up_and_policy(tmp_path, policy, after):
    module = fit(tmp_path, LearningRateSchedule(policy, warmup=4, start=0.2))
    assert shares(module) == pytest.approx([0.2, 0.4, 0.6, 0.8, *after])


def test_micro_batches_do_not_count_and_shares_are_of_steps(tmp_path):
    module = fit(tmp_path, LearningRateSchedule(Linear(), warmup=0.25, start=0.5), accumulate_grad_batches=3)
    assert shares(module) == pytest.approx([0.5, 0.75, 1.0, 0.75, 0.5, 0.25])


def test_steps_that_were_dropped_do_not_count(tmp_path):
    module = fit(tmp_path, LearningRateSchedule(Linear(), warmup=2, start=0.5, total_steps=6), Model(bad=(1, 4)))
    assert shares(module)[:8] == pytest.approx([0.5, 0.75, 0.75, 1.0, 0.75, 0.75, 0.5, 0.25])
    assert shares(module)[8:] == pytest.approx([0.0] * 8), "and no further than the end"


def test_steps_that_the_scaler_skips_do_not_count(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100))
    module = fit(tmp_path, LearningRateSchedule(Linear(), total_steps=40), plugins=[plugin])
    found = shares(module)
    skipped = found.count(1.0) - 1
    assert skipped > 0, "nothing was skipped"
    assert found[skipped:] == pytest.approx([1 - step / 40 for step in range(16 - skipped)])


def test_a_resumed_fit_goes_on(tmp_path):
    whole = fit(tmp_path, LearningRateSchedule(Cosine(), warmup=3))
    first = quiet_trainer(tmp_path, [LearningRateSchedule(Cosine(), warmup=3)], max_epochs=2)

    class Stops(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            trainer.should_stop = True

    first.callbacks.append(Stops())
    first.fit(Model())
    module = Model()
    second = quiet_trainer(tmp_path, [LearningRateSchedule(Cosine(), warmup=3)], max_epochs=2)
    second.fit(module, ckpt_path=tmp_path / "half.ckpt")
    assert module.rates == whole.rates[8:]


def test_lightnings_monitor_sees_it(tmp_path):
    module, logger = Model(), CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=logger, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[LearningRateSchedule(Linear()), monitor],
    )  # fmt: skip
    trainer.fit(module)
    assert any("pg2" in name for name in monitor.lrs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "`warmup` must be a whole number of optimizer steps"),
        ({"warmup": 1.0}, "above 0 and below 1, got 1.0"),
        ({"warmup": float("nan")}, "`warmup` must be"),
        ({"warmup": True}, "`warmup` must be"),
        ({"start": 1.5}, "`start` must be a share from 0 to 1, got 1.5"),
        ({"total_steps": 0}, "`total_steps` must be 'auto' or"),
        ({"total_steps": "all"}, "`total_steps` must be 'auto' or"),
        ({"policy": 0.1}, r"`policy` must be one such as `Cosine\(\)`, got 0.1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        LearningRateSchedule(**{"policy": Constant(), **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(end=-0.1), "`end` must be a share"),
        (lambda: Cosine(end=True), "`end` must be a share"),
        (lambda: InverseSquareRoot(timescale=0), "`timescale` must be a whole number"),
        (lambda: WarmupStableDecay(decay=0), "`decay` must be above 0"),
        (lambda: WarmupStableDecay(decay=2), "`decay` must be a share"),
    ],
)
def test_policies_out_of_range(make, message):
    with pytest.raises(MisconfigurationError, match=message):
        make()


def refused(folder, schedule, message, module=None, **options):
    module = module or Model()
    with pytest.raises(MisconfigurationError, match=message):
        fit(folder, schedule, module, **options)
    assert module.steps == 0


def test_a_warm_up_longer_than_training(tmp_path):
    refused(tmp_path, LearningRateSchedule(Constant(), warmup=16), "a warm-up of 16 steps is as long as training or")


@pytest.mark.parametrize("policy", [Linear(), Cosine(), WarmupStableDecay()])
def test_a_fit_without_end(tmp_path, policy):
    refused(tmp_path, LearningRateSchedule(policy), "must know when training ends", max_epochs=-1)
    refused(tmp_path, LearningRateSchedule(Constant(), warmup=0.1), "must know when training ends", max_epochs=-1)


def test_a_schedule_of_the_modules_own(tmp_path):
    module = Model(own=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    words = "LearningRateSchedule and the ExponentialLR that Model.configure_optimizers returns both set the learning"
    refused(tmp_path, LearningRateSchedule(Constant()), words, module)


def test_two_schedules(tmp_path):
    class Another(LearningRateSchedule):
        pass

    trainer = quiet_trainer(tmp_path, [LearningRateSchedule(Constant()), Another(Constant())])
    assert lightning_tricks.check(trainer, Model()).verdict == "refused"


def test_an_accumulation_that_changes(tmp_path):
    callbacks = [LearningRateSchedule(Linear()), GradientAccumulationScheduler({0: 1, 1: 2})]
    with pytest.raises(
        MisconfigurationError, match="Lightning's GradientAccumulationScheduler changes how many batches"
    ):
        quiet_trainer(tmp_path, callbacks).fit(Model())
    callbacks[0] = LearningRateSchedule(Linear(), total_steps=12)
    quiet_trainer(tmp_path, callbacks).fit(Model())


def test_manual_optimisation(tmp_path):
    module = Model()
    module.automatic_optimization = False
    refused(tmp_path, LearningRateSchedule(Constant()), "under manual optimisation Lightning steps no schedule", module)


def test_the_check_within_a_fit_does_not_take_it_for_the_modules(tmp_path):
    class Asks(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            assert lightning_tricks.check(trainer, pl_module).verdict == "exact"

    quiet_trainer(tmp_path, [LearningRateSchedule(Constant()), Asks()], max_epochs=1).fit(Model())
