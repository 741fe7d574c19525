"""Strategy presets and the flags that select them."""

from lightning_tricks.strategies.presets import PRESETS, Preset, flags, fsdp2, register, zero

__all__ = ["PRESETS", "Preset", "flags", "fsdp2", "register", "zero"]
