"""What SpikeRecovery must do on every engine, as jobs that a `Group` runs on every rank."""

from pathlib import Path

from lightning_tricks.callbacks import SpikeRecovery
from tests.callbacks.guard_jobs import Rates, Spoilt, same_in_every_bit, train
from tests.engines.checks import Run
from tests.engines.option_jobs import prepare

__all__ = ["prepare"]

OPTIONS = {"threshold": 10.0, "window": 8, "every_n_steps": 3}


class Spiking(Spoilt):
    """The loss of the batches in `bad` is a hundred times as large, on the last rank only."""

    def training_step(self, batch, index):
        kinds = batch[2]
        return super().training_step((*batch[:2], kinds * 0), index) * (1 + 99 * kinds.max().float())


def as_if_the_batches_had_not_been(engine: str, folder: str, precision: str = "32-true") -> None:
    """Weights, moments, schedule and running statistics of a fit without the batches since the state gone back to."""
    run, recovery, rates = Run(engine, Path(folder)), SpikeRecovery(**OPTIONS), Rates()
    found = train(run, Spiking(bad=(13,), batches=22), recovery, rates, precision=precision)
    assert recovery.rollbacks == 1
    # States are kept at the start and after 3, 6, 9 and 12 steps; the last but one is that after 9.
    expected = train(run, Spiking(left_out=(9, 10, 11, 12, 13), batches=22), precision=precision)
    same_in_every_bit(found, expected)
    assert found.global_step == expected.global_step + 5
    assert rates.rates[14] == rates.rates[9]


def back_to_the_start(engine: str, folder: str) -> None:
    """Before a second state is kept, that is the one without moments."""
    run, recovery = Run(engine, Path(folder)), SpikeRecovery(threshold=10.0, window=8, every_n_steps=100)
    found = train(run, Spiking(bad=(9,), batches=16), recovery)
    assert recovery.rollbacks == 1
    same_in_every_bit(found, train(run, Spiking(left_out=tuple(range(10)), batches=16)))
