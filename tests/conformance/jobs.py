"""Jobs for `test_engines.py`: workers that crash, raise and hang."""

import os
import signal
import sys
import time


def environment() -> dict[str, str | None]:
    os.write(1, b"a library's chatter on standard output")
    return {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}


def process_id() -> int:
    return os.getpid()


def rank() -> int:
    return int(os.environ["RANK"])


def crash(on_rank: int) -> None:
    if rank() == on_rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def leave(status: int) -> None:
    sys.stderr.write("last words\n")
    os._exit(status)


def fail(on_rank: int) -> None:
    if rank() == on_rank:
        raise ValueError("a broken trick")
    wait_for_the_other_rank()


def wait_for_the_other_rank() -> None:
    time.sleep(60)
