"""Checkpoints of other runs as the members of an ensemble."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_tricks.callbacks._ensemble_report import adapter_names
from lightning_tricks.engines import Stored, average_stored, open_member, refuse_other_member
from lightning_tricks.errors import CheckpointError, MisconfigurationError

__all__ = ["GivenMembers"]


class GivenMembers:
    """Opens given checkpoints before a fit, and averages them after it.

    Args:
        paths: of any engine; at least one.

    Raises:
        MisconfigurationError: if there is none, or one path instead of several.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        listed = isinstance(paths, Sequence) and not isinstance(paths, str)
        if not listed or not paths or not all(isinstance(path, str | Path) for path in paths):
            raise MisconfigurationError(
                f"CheckpointEnsemble's `members` must say which checkpoints to combine, got {paths!r}: pass a policy,"
                " such as TopK(3, monitor='val/loss'), or a list of at least one checkpoint."
            )
        self.paths = [Path(path) for path in paths]
        self._opened: list[Stored] = []

    def open(self, module: LightningModule) -> None:
        """Refuse what cannot be averaged, before the fit.

        Raises:
            CheckpointError: naming the file and its first offending entry.
        """
        self._opened = [open_member(path) for path in self.paths]
        for stored in self._opened:
            self._refuse_adapters(stored)
            refuse_other_member(self._opened[0], stored)
        if not is_overridden("configure_model", module):
            self._refuse_other_module(module)

    def average(self, places: Sequence[int], weights: Sequence[float], out: Path) -> None:
        """Write the weighted mean of the members at some places to a safetensors file."""
        average_stored([self._opened[place] for place in places], weights, out, {})

    def _refuse_adapters(self, stored: Stored) -> None:
        if found := adapter_names(list(stored.weights)):
            raise CheckpointError(
                f"{stored.path} holds adapters (`{found[0]}`), and the mean of A and of B apart is not the mean of the"
                " products BA: average them with `lightning_tricks.inference.average_checkpoints(..., module=...)`."
            )

    def _refuse_other_module(self, module: LightningModule) -> None:
        here = {name.replace("_orig_mod.", ""): tuple(value.shape) for name, value in module.state_dict().items()}
        there = {name: shape for name, (_, shape) in self._opened[0].layout.items()}
        for name in [*here, *there]:
            if here.get(name) != there.get(name):
                raise CheckpointError(
                    f"{self.paths[0]} is of another module: `{name}` is {_told(there.get(name))} there and"
                    f" {_told(here.get(name))} in {type(module).__name__}."
                )


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
