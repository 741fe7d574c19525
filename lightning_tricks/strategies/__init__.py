"""Strategy presets and the flags that select them."""

from lightning_tricks.strategies.describe import Description, describe
from lightning_tricks.strategies.presets import PRESETS, Preset, flags, fsdp2, register, zero

__all__ = ["Description", "PRESETS", "Preset", "describe", "flags", "fsdp2", "register", "zero"]
