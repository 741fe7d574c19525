"""The seam: what a trick may ask of whatever strategy trains."""

from lightning_tricks.engines._capabilities import Capability, Refusal, capabilities
from lightning_tricks.engines._consolidate import consolidate
from lightning_tricks.engines._facts import Bytes, Memory, Precisions
from lightning_tricks.engines._fsdp2_strategy import FSDP2Strategy
from lightning_tricks.engines._inspect import CheckpointFacts, inspect_checkpoint
from lightning_tricks.engines._protocol import Engine
from lightning_tricks.engines._ranks import ranks
from lightning_tricks.engines._read import read_checkpoint
from lightning_tricks.engines._select import engine_of
from lightning_tricks.engines._shards import Shard
from lightning_tricks.engines._whole import whole
from lightning_tricks.engines._zero_strategy import ZeroStrategy

__all__ = [
    "Bytes",
    "Capability",
    "CheckpointFacts",
    "Engine",
    "FSDP2Strategy",
    "Memory",
    "Precisions",
    "Refusal",
    "Shard",
    "ZeroStrategy",
    "capabilities",
    "consolidate",
    "engine_of",
    "inspect_checkpoint",
    "ranks",
    "read_checkpoint",
    "whole",
]
