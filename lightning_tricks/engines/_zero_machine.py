"""What ZeRO needs of the machine: DeepSpeed, and DeepSpeed on a CPU."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_tricks.errors import MissingDependencyError

__all__ = ["gloo_only", "require_deepspeed", "use_cpu"]


def require_deepspeed() -> None:
    """Refuse to go on without DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(
            "ZeRO needs DeepSpeed, which is not installed: pip install 'lightning-tricks[deepspeed]'"
        )


def use_cpu() -> None:
    """Make DeepSpeed compute on the CPU where the machine has a GPU too."""
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


@contextmanager
def gloo_only() -> Iterator[None]:
    """Without DeepSpeed's shared-memory collectives, whose first use compiles C++ and fails without a compiler."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    build = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build
