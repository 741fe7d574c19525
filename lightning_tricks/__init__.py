"""Training tricks that plug into any Lightning Trainer and stay correct under every strategy."""

__all__ = ["__version__"]

__version__ = "0.1.0"
