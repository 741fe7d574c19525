"""What both strategies need of the machine."""

import os

from lightning.pytorch.strategies import ParallelStrategy

from lightning_tricks.errors import MisconfigurationError

__all__ = ["refuse_offload", "refuse_oversubscription"]


def refuse_oversubscription(strategy: ParallelStrategy) -> None:
    """Refuse more CPU processes than cores. Lightning itself refuses more GPUs than there are."""
    processes, cores = len(strategy.parallel_devices or []), _cores()
    if strategy.root_device.type == "cpu" and processes > cores:
        raise MisconfigurationError(
            f"`devices={processes}` asks for {processes} processes, but this machine has {cores} CPU core"
            f"{'' if cores == 1 else 's'} for this program: ask for `devices={cores}` or fewer."
        )


def refuse_offload(value: object) -> None:
    """Refuse any value of the option but None and `"cpu"`."""
    if value not in (None, "cpu"):
        raise MisconfigurationError(f"`offload` must be 'cpu' or None, got {value!r}.")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
