"""What SpikeRecovery must do on every engine, as jobs that a `Group` runs on every rank."""

from pathlib import Path

from lightning_tricks.callbacks import SpikeRecovery
from tests.callbacks.guard_jobs import Rates, Spoilt, same_in_every_bit, train
from tests.engines.checks import Run, fp16_options
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

OPTIONS = {"threshold": 10.0, "window": 8, "every_n_steps": 3}


class Spiking(Spoilt):
    """The loss of the batches in `bad` is a hundred times as large, on the last rank only."""

    def training_step(self, batch, index):
        kinds = batch[2]
        return self.raised(super().training_step((*batch[:2], kinds * 0), index), kinds.max())

    def raised(self, loss, bad):
        return loss * (1 + 99 * bad.float())


class Lifted(Spiking):
    """A spike of the loss alone: gradients a hundred times as large would overflow, and the scaler drop the step."""

    def raised(self, loss, bad):
        return loss + 99 * bad.float()


def as_if_the_batches_had_not_been(engine: str, folder: str, precision: str = "32-true") -> None:
    """Weights, moments, schedule and running statistics of a fit without the batches since the state gone back to."""
    run, recovery, rates = Run(engine, Path(folder)), SpikeRecovery(**OPTIONS), Rates()
    kind, options = (Lifted, fp16_options) if precision == "16-mixed" else (Spiking, lambda _: {"precision": precision})
    found = train(run, kind(bad=(13,), batches=22), recovery, rates, **options(run))
    assert recovery.rollbacks == 1
    # States are kept at the start and after 3, 6, 9 and 12 steps; the last but one is that after 9.
    expected = train(run, kind(left_out=(9, 10, 11, 12, 13), batches=22), **options(run))
    same_in_every_bit(found, expected)
    assert found.global_step == expected.global_step + 5
    assert rates.rates[14] == rates.rates[9]


def back_to_the_start(engine: str, folder: str) -> None:
    """Before a second state is kept, that is the one without moments."""
    run, recovery = Run(engine, Path(folder)), SpikeRecovery(threshold=10.0, window=8, every_n_steps=100)
    found = train(run, Spiking(bad=(9,), batches=16), recovery)
    assert recovery.rollbacks == 1
    same_in_every_bit(found, train(run, Spiking(left_out=tuple(range(10)), batches=16)))
