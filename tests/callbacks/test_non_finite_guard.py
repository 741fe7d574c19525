"""NonFiniteGuard on one device: schedules, options, files. The traps on every engine are in test_guard_engines.py."""

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler as schedules

import lightning_tricks
from lightning_tricks.callbacks import GradientClipping, NonFiniteGuard
from lightning_tricks.callbacks._batch_file import portable
from lightning_tricks.errors import DegradedWarning, MisconfigurationError, NonFiniteError
from tests.callbacks.guard_jobs import Spoilt
from tests.engines.checks import float_weights

pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")

SCHEDULES = {
    "exponential": lambda optimizer: schedules.ExponentialLR(optimizer, 0.9),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, 0.1, total_steps=14),
    "cosine": lambda optimizer: schedules.CosineAnnealingLR(optimizer, 5),
    "restarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, 3),
    "sequence": lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, total_iters=3), schedules.ExponentialLR(optimizer, 0.9)], [3]
    ),
}


class Scheduled(Spoilt):
    def __init__(self, build, interval="step", monitor=None, frequency=1, **options):
        super().__init__(**options)
        self.build, self.choices = build, {"interval": interval, "frequency": frequency}
        if monitor is not None:
            self.choices["monitor"] = monitor
        self.steps = 0

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("loss", loss)
        return loss

    def lr_scheduler_step(self, scheduler, metric):
        self.steps += 1
        super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.build(optimizer), **self.choices}}


def fitted(trainer, module, *callbacks, **options):
    run = trainer(list(callbacks), **{"max_epochs": 2, **options})
    run.fit(module)
    return run


def same_ends(found, expected):
    wanted = float_weights(expected)
    assert all(torch.equal(value, wanted[name]) for name, value in float_weights(found).items())
    (one,), (other,) = found.lr_scheduler_configs, expected.lr_scheduler_configs
    assert repr(one.scheduler.state_dict()) == repr(other.scheduler.state_dict())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_waits_for_dropped_steps(trainer, name):
    poisoned, without = (Scheduled(SCHEDULES[name], **options) for options in ({"bad": (3,)}, {"left_out": (3,)}))
    same_ends(fitted(trainer, poisoned, NonFiniteGuard()), fitted(trainer, without))
    assert poisoned.steps == without.steps == 14


def test_a_plateau_by_step_waits_too(trainer):
    def plateau(optimizer):
        return schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    poisoned, without = (
        Scheduled(plateau, monitor="loss", **options) for options in ({"bad": (3, 7)}, {"left_out": (3, 7)})
    )
    same_ends(fitted(trainer, poisoned, NonFiniteGuard()), fitted(trainer, without))
    assert poisoned.steps == without.steps == 12


def test_a_schedule_by_epoch_goes_on_after_a_dropped_last_step(trainer):
    module = Scheduled(SCHEDULES["exponential"], interval="epoch", bad=(7,))
    run = fitted(trainer, module, NonFiniteGuard())
    assert module.steps == 2
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.81e-2)


def test_a_monitor_of_rates_misses_nothing(trainer, tmp_path):
    module = Scheduled(SCHEDULES["exponential"], bad=(3, 4))
    monitor = LearningRateMonitor()
    logger = CSVLogger(tmp_path, name="", version="rates")
    fitted(trainer, module, monitor, NonFiniteGuard(), logger=logger, log_every_n_steps=1, max_epochs=1)
    rows = (tmp_path / "rates" / "metrics.csv").read_text().split()
    place = rows[0].split(",").index("lr-AdamW")
    rates = [float(row.split(",")[place]) for row in rows[1:] if row.split(",")[place]]
    assert rates == pytest.approx([1e-2 * 0.9**step for step in (0, 1, 2, 3, 3, 3, 4, 5)])


def test_a_frequency_above_1_is_told(trainer):
    module = Scheduled(SCHEDULES["exponential"], frequency=2)
    with pytest.warns(DegradedWarning, match="counts batches for a schedule with `frequency=2`"):
        fitted(trainer, module, NonFiniteGuard())


class ByHand(Spoilt):
    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, index))
        self.optimizers().step()


def test_manual_optimisation_drops_steps_and_is_told_of_its_schedules(trainer):
    guard, module, without = NonFiniteGuard(), ByHand(bad=(3,)), ByHand(left_out=(3,))
    with pytest.warns(DegradedWarning, match="the module steps its schedules"):
        found = fitted(trainer, module, guard)
    assert guard.skipped_steps == 2
    expected = float_weights(fitted(trainer, without))
    assert all(torch.equal(value, expected[name]) for name, value in float_weights(found).items())


def test_the_count_and_the_row_survive_a_resume(trainer, tmp_path):
    first = trainer([NonFiniteGuard(max_skips=2)], max_steps=4, max_epochs=-1)
    first.fit(Spoilt(bad=(2, 3)))
    first.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = NonFiniteGuard(max_skips=2)
    with pytest.raises(NonFiniteError, match=r"epoch 0, batch 2 .*epoch 0, batch 3 .*; epoch"):
        trainer([resumed], max_epochs=2).fit(Spoilt(bad=(0,)), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.skipped_steps == 3


def test_schedules_are_let_go_when_the_fit_ends_in_an_error(trainer):
    run = trainer([NonFiniteGuard(max_skips=0)], max_epochs=1)
    with pytest.raises(NonFiniteError, match=r"1 steps in a row .* `max_skips=0`"):
        run.fit(Scheduled(SCHEDULES["exponential"], bad=(1,)))
    assert run.lr_scheduler_configs[0].frequency == 1


class Empty(L.Callback):
    """Not one of ours."""


def test_the_guard_acts_before_clipping_whatever_the_order(trainer):
    clip, guard, other = GradientClipping(1.0), NonFiniteGuard(), Empty()
    run = trainer([clip, other, guard], max_epochs=1)
    run.fit(Spoilt())
    assert run.callbacks[:3] == [guard, other, clip]


def test_a_disk_that_is_full_costs_the_file_and_not_the_fit(trainer, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    guard = NonFiniteGuard(dirpath=tmp_path / "files")
    monkeypatch.setattr(os, "replace", refuse)
    fitted(trainer, Spoilt(bad=(3,)), guard, max_epochs=1)
    assert guard.skipped_steps == 1
    assert "rank 0 could not keep the batches" in caplog.text
    assert not list((tmp_path / "files").iterdir())


def test_a_dry_run_writes_nothing(trainer, tmp_path):
    guard = NonFiniteGuard(dirpath=tmp_path / "files")
    fitted(trainer, Spoilt(bad=(0,)), guard, fast_dev_run=True)
    assert guard.skipped_steps == 1
    assert not (tmp_path / "files").exists()


def test_batches_are_kept_as_far_as_they_can_be_pickled(tmp_path):
    tensor = torch.arange(6.0, requires_grad=True)
    kept = portable({"views": (tensor[:2], [tensor[2:]]), "text": ["a"], "call": lambda: 0, "module": nn.Linear(1, 1)})
    torch.save(kept, tmp_path / "batch.pt")
    loaded = torch.load(tmp_path / "batch.pt", weights_only=False)
    assert loaded["views"][0].tolist() == [0.0, 1.0]
    assert loaded["views"][0].untyped_storage().nbytes() == 8
    assert loaded["call"].startswith("<function")
    assert isinstance(loaded["module"], nn.Linear)


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "3"])
def test_numbers_of_skips_that_make_no_sense(value):
    with pytest.raises(MisconfigurationError, match=rf"at least 0, got {value!r}"):
        NonFiniteGuard(max_skips=value)


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    run = trainer([NonFiniteGuard(dirpath=tmp_path / "file" / "folder")], max_epochs=1)
    with pytest.raises(MisconfigurationError, match="NonFiniteGuard cannot write to its folder"):
        run.fit(Spoilt())
    assert run.global_step == 0


def test_check_calls_it_exact(trainer):
    report = lightning_tricks.check(trainer([NonFiniteGuard()]), Spoilt())
    assert [finding.verdict for finding in report if finding.trick == "NonFiniteGuard"] == ["exact"]


def test_one_wait_for_the_device_in_a_step(trainer, monkeypatch):
    """Reading flags is the one place where a value leaves the device."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, noting(reads, name, original))
    guard = NonFiniteGuard()
    run = trainer([guard], max_epochs=1)
    within = []
    for hook in ("on_before_backward", "on_before_optimizer_step", "on_train_batch_start", "on_train_batch_end"):
        monkeypatch.setattr(guard, hook, counting(within, reads, hook, getattr(guard, hook)))
    run.fit(Spoilt(batches=3))
    assert within == [("on_before_optimizer_step", ["tolist"])] * 3


def noting(reads, name, original):
    def method(self, *args, **kwargs):
        reads.append(name)
        return original(self, *args, **kwargs)

    return method


def counting(within, reads, hook, original):
    def method(*args, **kwargs):
        reads.clear()
        original(*args, **kwargs)
        if reads:
            within.append((hook, list(reads)))

    return method
