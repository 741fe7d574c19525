"""Where the training of a data module stands, from one fit to its resumption and to no other."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lightning_tricks.data.loader import TricksDataLoader

__all__ = ["TrainPosition"]


class TrainPosition:
    """The position of a data module's training loader, for the module's state.

    Lightning restores that of a loader itself, but not if `configure_optimizers` asked for the number of steps. It
    hands a checkpoint's state to a data module for a test as well, and one module may serve several fits: neither
    moves the training of another fit.

    Args:
        datamodule: whose `setup`, `train_dataloader`, `state_dict` and `load_state_dict` call the methods.

    Example:
        >>> loader = TricksDataLoader(range(8), batch_size=2, shuffle=False, seed=0)
        >>> position = TrainPosition(LightningDataModule())
        >>> position.of(loader) is loader, next(iter(loader)).tolist(), position.state()["batches"]
        (True, [0, 1], 1)
    """

    def __init__(self, datamodule: LightningDataModule) -> None:
        self._datamodule = datamodule
        self._loader: TricksDataLoader | None = None
        self._restored: dict[str, Any] | None = None

    def begin(self, stage: str) -> None:
        """Forget the fit before; Lightning sets up before it restores."""
        if stage == "fit":
            self._loader = self._restored = None

    def of(self, loader: TricksDataLoader) -> TricksDataLoader:
        """The fit's loader, moved to where the checkpoint stood if it is resumed."""
        self._loader = loader
        self._move()
        return loader

    def state(self) -> dict[str, Any] | None:
        """Of the fit's loader; None before there is one."""
        return None if self._loader is None else self._loader.state_dict()

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from where `state` was taken, at once or when the loader is made."""
        trainer = self._datamodule.trainer
        if trainer is None or trainer.state.fn == TrainerFn.FITTING:
            self._restored = state
            self._move()

    def _move(self) -> None:
        if self._loader is not None and self._restored is not None:
            self._loader.load_state_dict(self._restored)
