"""How a process of several ranks starts its workers, and how it ends."""

import gc

from torch import distributed

__all__ = ["leave", "start_method"]


def leave() -> None:
    """End the process group, once nothing else holds it.

    Left to the end of the interpreter, its threads abort the process now and then. And what is ended while DDP holds it
    goes with DDP, which waits, holding the interpreter, for a thread that may wait for the interpreter.
    """
    gc.collect()  # trainers and what they wrapped are cycles
    if distributed.is_initialized():
        distributed.destroy_process_group()


def start_method(workers: int) -> str | None:
    """How a loader's workers are started where there is a process group.

    Not by a fork: CPython 3.11 deadlocks in the child when a thread of the group is just asking for the interpreter.
    """
    return "forkserver" if workers else None
