"""What every callback of the suite shares: its engine, a key of its own in checkpoints, a folder it can write."""

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_tricks.callbacks._order import arrange
from lightning_tricks.engines import Engine, Trick, check_before_fit, engine_of
from lightning_tricks.errors import MisconfigurationError

__all__ = ["TrickCallback", "is_dry_run", "writable_folder"]


class TrickCallback(Callback):
    """Base of the suite's callbacks.

    Subclasses say what tells two instances apart (`_identity`), and override `_prepare`, `_capture` and `_restore`
    instead of `setup`, `state_dict` and `load_state_dict`: state is loaded into a `fit` only, so that
    `trainer.test(ckpt_path=...)` afterwards leaves what the fit found as it was.

    Those that treat gradients or weights have a `place`, and act in its order whatever their order in the Trainer's
    list: -1 chooses the accumulation, 0 drops steps, 1 measures, 2 clips, 3 averages, 4 schedules or restores.

    The first of them in a fit runs `lightning_tricks.check`, which goes by what each declares in `trick`.
    """

    trick: ClassVar[Trick] = Trick()
    runs_check: ClassVar[bool] = True
    place: ClassVar[int | None] = None
    _stage: str = "fit"

    @property
    def engine(self) -> Engine:
        """The engine of the Trainer that this callback was last set up for."""
        return self._engine

    @property
    def state_key(self) -> str:
        """The callback's key in a checkpoint: the class and what tells two instances apart."""
        return self._generate_state_key(**self._identity())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the engine, which refuses a foreign Trainer, and check and prepare a fit."""
        self._engine = engine_of(trainer)
        self._stage = stage
        if stage == "fit":
            arrange(trainer)
            check_before_fit(trainer, self)
            self._prepare(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what depends on the model and the optimizers, which are built now."""
        check_before_fit(trainer, self, "built")

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, in plain types."""
        return self._capture()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, in a fit."""
        if self._stage == "fit":
            self._restore(state_dict)

    def _identity(self) -> dict[str, Any]:
        return {}

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Configure the engine and check the options against the Trainer and the module, before a fit."""

    def _capture(self) -> dict[str, Any]:
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over what `_capture` gave."""


def writable_folder(trick: str, folder: str | Path) -> Path:
    """Create the folder if need be and write to it once.

    Args:
        trick: the callback's name, for the message.
        folder: where the callback will write.

    Returns:
        The folder, absolute.

    Raises:
        MisconfigurationError: if it cannot be created or written.
    """
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise MisconfigurationError(
            f"{trick} cannot write to its folder {path}: {error.strerror or error}. Pass a `dirpath` that can be "
            "written, or change `Trainer(default_root_dir=...)`."
        ) from error
    return path


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the Trainer only tries its hooks out (`fast_dev_run`) and nothing is to be written."""
    return bool(vars(trainer)["fast_dev_run"])
