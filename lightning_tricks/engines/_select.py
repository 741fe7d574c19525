"""From a Trainer to its engine."""

import weakref

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_tricks.engines._base import BaseEngine
from lightning_tricks.engines._plain import PlainEngine
from lightning_tricks.engines._protocol import Engine
from lightning_tricks.engines._saving import save_safely
from lightning_tricks.errors import MisconfigurationError, UnsupportedError

__all__ = ["engine_of"]

_ENGINES: "weakref.WeakKeyDictionary[Strategy, BaseEngine]" = weakref.WeakKeyDictionary()


def engine_of(trainer: Trainer) -> Engine:
    """The engine behind a Trainer: what a trick asks instead of asking which strategy is running.

    From then on one device and DDP save like the other engines: a file appears when it is complete, and a disk that
    is full ends every rank with a CheckpointError.

    Args:
        trainer: a `lightning.pytorch.Trainer`, in any phase. The same engine comes back every time.

    Raises:
        MisconfigurationError: if it is not a `lightning.pytorch.Trainer`.
        UnsupportedError: if the suite has no engine for the Trainer's strategy.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> engine_of(trainer).name
        'one_device'
    """
    if not isinstance(trainer, Trainer):
        raise _foreign(trainer)
    if trainer.strategy not in _ENGINES:
        _ENGINES[trainer.strategy] = _build(trainer)
    return _ENGINES[trainer.strategy]


def _build(trainer: Trainer) -> BaseEngine:
    strategy = trainer.strategy
    save_safely(trainer)
    if isinstance(strategy, DeepSpeedStrategy):
        from lightning_tricks.engines._deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(trainer)
    if isinstance(strategy, ModelParallelStrategy):
        from lightning_tricks.engines._fsdp2 import FSDP2Engine

        return FSDP2Engine(trainer, "fsdp2")
    if isinstance(strategy, FSDPStrategy):
        from lightning_tricks.engines._fsdp1 import FSDP1Engine

        return FSDP1Engine(trainer)
    if isinstance(strategy, DDPStrategy):
        return PlainEngine(trainer, "ddp")
    if isinstance(strategy, SingleDeviceStrategy):
        return PlainEngine(trainer, "one_device")
    raise _unsupported(strategy)


def _unsupported(strategy: object) -> UnsupportedError:
    return UnsupportedError(
        "A trick",
        type(strategy).__name__,
        "the suite has no engine for this strategy",
        "use `strategy='fsdp2'`, 'ddp', 'zero_1', 'zero_2' or 'zero_3'",
    )


def _foreign(trainer: object) -> MisconfigurationError:
    home = type(trainer).__module__.partition(".")[0]
    if home == "pytorch_lightning":
        return MisconfigurationError(
            f"{type(trainer).__name__} is a pytorch_lightning Trainer; lightning_tricks needs lightning.pytorch:"
            " `from lightning import Trainer`."
        )
    return MisconfigurationError(
        f"engine_of needs a `lightning.pytorch.Trainer`, got {type(trainer).__name__}: `from lightning import Trainer`."
    )
