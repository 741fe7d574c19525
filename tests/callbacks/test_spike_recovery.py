"""SpikeRecovery on one device."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from lightning_tricks.callbacks import BatchSizeAccumulation, NonFiniteGuard, SpikeRecovery
from lightning_tricks.errors import DivergenceError, MisconfigurationError
from tests.callbacks.spike_jobs import OPTIONS, Spiking

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]


def fit(trainer, module, *callbacks, **options):
    run = trainer(list(callbacks), **{"max_epochs": 1, "limit_val_batches": 0, **options})
    run.fit(module)
    return run


def state_of(run):
    (optimizer,) = run.optimizers
    moments = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*run.lightning_module.state_dict().values(), *moments]


def same(found, expected):
    pairs = zip(state_of(found), state_of(expected), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_is_as_if_the_batches_had_not_been(trainer):
    recovery = SpikeRecovery(**OPTIONS)
    found = fit(trainer, Spiking(bad=(13,), batches=22), recovery)
    expected = fit(trainer, Spiking(left_out=(9, 10, 11, 12, 13), batches=22))
    assert same(found, expected)
    assert found.callback_metrics["rollbacks"] == recovery.rollbacks == 1
    (one,), (other,) = found.lr_scheduler_configs, expected.lr_scheduler_configs
    assert one.scheduler.state_dict() == other.scheduler.state_dict()
    assert not same(found, fit(trainer, Spiking(bad=(13,), batches=22)))


def test_without_a_spike_nothing_changes(trainer):
    recovery = SpikeRecovery(**OPTIONS)
    assert same(fit(trainer, Spiking(batches=22), recovery), fit(trainer, Spiking(batches=22)))
    assert recovery.rollbacks == 0


def test_windows_are_judged_as_a_whole(trainer):
    recovery = SpikeRecovery(**OPTIONS)
    found = fit(trainer, Spiking(bad=(26,), batches=44), recovery, accumulate_grad_batches=2)
    expected = fit(trainer, Spiking(left_out=tuple(range(18, 28)), batches=44), accumulate_grad_batches=2)
    assert recovery.rollbacks == 1
    assert same(found, expected)


def test_a_loss_scale_that_grows_is_no_spike(trainer):
    """Lightning hands over the scaled loss, which doubles with the scale."""
    recovery = SpikeRecovery(**OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12, growth_interval=9, growth_factor=64.0)
    fit(trainer, Spiking(batches=22), recovery, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() > 2**-12
    assert recovery.rollbacks == 0


def test_a_shorter_window_is_no_spike(trainer):
    """Lightning hands over the loss divided by the number of batches of a step."""
    recovery, accumulation = SpikeRecovery(**OPTIONS), BatchSizeAccumulation({0: 128, 12: 16}, per_batch=16)
    fit(trainer, Spiking(batches=120), accumulation, recovery)
    assert recovery.rollbacks == 0


def test_a_spike_before_the_window_is_full_is_none(trainer):
    recovery = SpikeRecovery(**OPTIONS)
    fit(trainer, Spiking(bad=(5,), batches=10), recovery)
    assert recovery.rollbacks == 0


class NaN(Spiking):
    def training_step(self, batch, index):
        return super().training_step(batch, index) * (math.nan if index == 13 else 1)


def test_a_loss_that_is_no_number_is_a_spike(trainer):
    recovery = SpikeRecovery(**OPTIONS)
    found = fit(trainer, NaN(batches=22), recovery)
    assert recovery.rollbacks == 1
    assert same(found, fit(trainer, Spiking(left_out=(9, 10, 11, 12, 13), batches=22)))


def test_what_the_guard_has_dropped_is_not_rolled_back(trainer):
    recovery = SpikeRecovery(**OPTIONS)
    found = fit(trainer, NaN(batches=22), recovery, NonFiniteGuard())
    assert recovery.rollbacks == 0
    assert same(found, fit(trainer, Spiking(left_out=(13,), batches=22)))


def test_too_many_attempts_end_the_fit(trainer):
    recovery = SpikeRecovery(**OPTIONS, max_attempts=2)
    with pytest.raises(DivergenceError, match=r"spiked at the steps 14, 16, 18, .* `max_attempts=2`"):
        fit(trainer, Spiking(bad=(13, 15, 17), batches=30), recovery)
    assert recovery.rollbacks == 2


def test_attempts_are_forgotten_after_a_window_of_good_steps(trainer):
    recovery = SpikeRecovery(**OPTIONS, max_attempts=1)
    fit(trainer, Spiking(bad=(13, 30), batches=40), recovery)
    assert recovery.rollbacks == 2


def test_resumed_equals_uninterrupted(trainer, tmp_path):
    """A checkpoint counts as a good state: a spike soon after it goes back to what it holds, resumed or not."""

    class Saving(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def module():
        return Spiking(bad=(1, 13), batches=22)  # the first one in the second epoch only: before, there is no window

    whole, resumed = SpikeRecovery(**OPTIONS), SpikeRecovery(**OPTIONS)
    expected = fit(trainer, module(), whole, Saving(), max_epochs=2)
    found = trainer([resumed], max_epochs=2, limit_val_batches=0)
    found.fit(module(), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.state_dict() == whole.state_dict()
    assert whole.rollbacks == 3
    assert same(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "`threshold` must be a finite number above 0, got 0"),
        ({"threshold": math.nan}, "got nan"),
        ({"window": 4}, "`window` must be a whole number of at least 8, got 4"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1, got 0"),
        ({"max_attempts": True}, "`max_attempts` must be a whole number of at least 1, got True"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        SpikeRecovery(**options)
