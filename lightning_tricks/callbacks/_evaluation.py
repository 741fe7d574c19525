"""Score other weights inside a fit, and leave no trace of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_tricks.engines import Engine, aside

__all__ = ["borrowed_weights", "validate"]


@contextmanager
def borrowed_weights(engine: Engine, path: Path, scratch: Path) -> Iterator[None]:
    """Let the module hold the weights of a file for a while, then put its own back, bit for bit. Collective.

    After an exception only a lone process puts them back: the other ranks may be waiting elsewhere, and to wait for
    them here would turn a crash into a hang.

    Args:
        engine: the engine that trains.
        path: the weights to hold.
        scratch: where the module's own weights lie meanwhile.
    """
    engine.save_weights(scratch)
    try:
        engine.load_weights(path)
        yield
    except BaseException:
        if engine.world_size == 1:
            engine.load_weights(scratch)
        raise
    else:
        engine.load_weights(scratch)
        engine.barrier()
    finally:
        if engine.rank == 0:
            scratch.unlink(missing_ok=True)


def validate(trainer: Trainer) -> dict[str, float]:
    """Run the fit's validation once more, outside its bookkeeping. Collective.

    The module's own validation hooks run; callbacks (except the progress bar) and loggers do not hear of it, and the
    metrics, the progress and the random state of the fit are afterwards what they were.

    Args:
        trainer: a Trainer in `on_train_end`.

    Returns:
        What the module logged, by name.
    """
    with aside(trainer), _unheard(trainer), isolate_rng():
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.run()
            return {name: float(value) for name, value in trainer.callback_metrics.items()}
        finally:
            trainer.training = True


@contextmanager
def _unheard(trainer: Any) -> Iterator[None]:
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    callbacks, loggers, progress = trainer.callbacks, trainer.loggers, deepcopy(loop.batch_progress.state_dict())
    metrics = dict(vars(connector))
    connector.reset_metrics()
    trainer.callbacks = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    trainer.loggers = [DummyLogger()]
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers
        loop.batch_progress.load_state_dict(progress)
        vars(connector).update(metrics)
