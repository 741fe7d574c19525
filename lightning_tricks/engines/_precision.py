"""A strategy that brings its precision along, so that a flag can name it."""

from typing import Literal

from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import DeepSpeedPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_tricks.errors import MisconfigurationError

__all__ = ["BringsPrecision", "Mixed"]

Mixed = Literal["bf16-mixed", "16-mixed"]
_LEFT_OUT = "32-true"  # what Lightning hands over where the Trainer's `precision` is left out


class BringsPrecision(Strategy):
    """Put before Lightning's strategy class: `_bring_precision` then decides, or refuses a Trainer that disagrees.

    Lightning hands its precision plugin to the strategy by setting `precision_plugin`, and asks the strategy for it
    ever after. `"32-true"` is what it hands over where the Trainer's `precision` is left out, so it counts as left out.
    """

    _brought: Mixed | None = None
    _told_by = ""
    _alike: str | None = None

    def _bring_precision(
        self, precision: Mixed | None, told_by: str = "The strategy's precision", alike: str | None = None
    ) -> None:
        if precision not in (None, "bf16-mixed", "16-mixed"):
            raise MisconfigurationError(
                f"`precision` of a strategy must be 'bf16-mixed', '16-mixed' or None, got {precision!r}. Give any"
                " other to the Trainer."
            )
        self._brought, self._told_by, self._alike = precision, told_by, alike

    @property
    def precision_plugin(self) -> Precision:
        """The plugin in force."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and self._brought is not None and plugin.precision not in (self._brought, self._alike):
            if plugin.precision != _LEFT_OUT:
                raise MisconfigurationError(
                    f"{self._told_by} is {self._brought!r} and the Trainer's is {str(plugin.precision)!r}:"
                    " leave one of them out."
                )
            plugin = self._plugin(self._brought)
            rank_zero_info(f"Precision {self._brought}, as the strategy says")
        Strategy.precision_plugin.__set__(self, plugin)  # type: ignore[attr-defined]

    def _plugin(self, precision: Mixed) -> Precision:
        if isinstance(self, DeepSpeedStrategy):
            return DeepSpeedPrecision(precision)
        return MixedPrecision(precision, "cpu" if isinstance(self.accelerator, CPUAccelerator) else "cuda")
