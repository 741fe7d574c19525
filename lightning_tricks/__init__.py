"""Training tricks that plug into any Lightning Trainer and stay correct under every strategy."""

from lightning_tricks.engines import check
from lightning_tricks.strategies import register as _register

__all__ = ["__version__", "check"]

__version__ = "0.1.0"

_register()
