"""The seam: what a trick may ask of whatever strategy trains."""

from lightning_tricks.engines._allowed import allow_hyper_parameters
from lightning_tricks.engines._aside import aside, is_aside
from lightning_tricks.engines._average import average_stored, newest_of, refuse_other_meaning, refuse_other_weights
from lightning_tricks.engines._blocks import find_blocks
from lightning_tricks.engines._capabilities import Capability, Refusal, capabilities
from lightning_tricks.engines._check import check, check_before_fit
from lightning_tricks.engines._consolidate import consolidate
from lightning_tricks.engines._facts import Bytes, Memory, Precisions
from lightning_tricks.engines._fsdp2_strategy import FSDP2Strategy
from lightning_tricks.engines._inspect import CheckpointFacts, inspect_checkpoint
from lightning_tricks.engines._member import open_member, refuse_other_member, refuse_two_sets
from lightning_tricks.engines._protocol import Engine
from lightning_tricks.engines._ranks import gather_over_ranks, ranks
from lightning_tricks.engines._read import read_checkpoint
from lightning_tricks.engines._report import Finding, Report
from lightning_tricks.engines._rules import rival
from lightning_tricks.engines._saving import save_safely, stream_on_rank_zero, write_on_rank_zero
from lightning_tricks.engines._schedules import HeldSchedules, add_schedule
from lightning_tricks.engines._select import engine_of
from lightning_tricks.engines._shards import Shard
from lightning_tricks.engines._snapshot import Snapshot
from lightning_tricks.engines._stored import Stored, open_checkpoint, write_checkpoint
from lightning_tricks.engines._tricks import InUse, Rule, Situation, Trick
from lightning_tricks.engines._whole import whole
from lightning_tricks.engines._zero_files import Whole
from lightning_tricks.engines._zero_strategy import ZeroStrategy

__all__ = [
    "Bytes",
    "Capability",
    "CheckpointFacts",
    "Engine",
    "FSDP2Strategy",
    "Finding",
    "HeldSchedules",
    "InUse",
    "Memory",
    "Precisions",
    "Refusal",
    "Report",
    "Rule",
    "Shard",
    "Situation",
    "Snapshot",
    "Stored",
    "Trick",
    "Whole",
    "ZeroStrategy",
    "add_schedule",
    "allow_hyper_parameters",
    "aside",
    "average_stored",
    "capabilities",
    "check",
    "check_before_fit",
    "consolidate",
    "engine_of",
    "find_blocks",
    "gather_over_ranks",
    "inspect_checkpoint",
    "is_aside",
    "newest_of",
    "open_checkpoint",
    "open_member",
    "ranks",
    "read_checkpoint",
    "refuse_other_meaning",
    "refuse_other_member",
    "refuse_other_weights",
    "refuse_two_sets",
    "rival",
    "save_safely",
    "stream_on_rank_zero",
    "whole",
    "write_checkpoint",
    "write_on_rank_zero",
]
