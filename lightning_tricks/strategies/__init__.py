"""Strategy presets and the flags that select them."""

from lightning_tricks.strategies.describe import Description, describe
from lightning_tricks.strategies.presets import PRESETS, Preset, flags, fsdp2, register, zero

__all__ = ["PRESETS", "Description", "Preset", "describe", "flags", "fsdp2", "register", "zero"]
