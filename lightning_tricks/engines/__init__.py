"""The seam: what a trick may ask of whatever strategy trains."""

from lightning_tricks.engines._protocol import Engine
from lightning_tricks.engines._ranks import ranks
from lightning_tricks.engines._select import engine_of
from lightning_tricks.engines._whole import whole

__all__ = ["Engine", "engine_of", "ranks", "whole"]
