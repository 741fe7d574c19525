"""A process group for tests: two real processes over gloo, many checks, a time limit, tracebacks shown."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


def run_group(pairs: list[tuple[str, str]], folder: Path, processes: int, seconds: float) -> dict[tuple[str, str], str]:
    """Run (engine, check) pairs in order; the first failure of a process ends its work.

    Returns:
        (engine, check) -> "passed", a traceback, or why there is none.
    """
    port = _free_port()
    logs = [folder / f"{pairs[0][0]}-{rank}.log" for rank in range(processes)]
    members = [
        _start([str(folder), *map(":".join, pairs)], _environment(rank, processes, port), log)
        for rank, log in enumerate(logs)
    ]
    try:
        ended = _wait(members, seconds)
    finally:
        for member in members:
            _kill(member)
    return {pair: _verdict(*pair, folder, processes, ended, logs) for pair in pairs}


def _start(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, str(WORKER), *arguments],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(members: list[subprocess.Popen], seconds: float) -> bool:
    try:
        for member in members:
            member.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(member: subprocess.Popen) -> None:
    if member.poll() is None:
        os.killpg(member.pid, signal.SIGKILL)
        member.wait()


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    names = ["RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
    values = [rank, rank, 0, processes, processes]
    group = {name: str(value) for name, value in zip(names, values, strict=True)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **(group if processes > 1 else {})}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _verdict(engine: str, check: str, folder: Path, processes: int, ended: bool, logs: list[Path]) -> str:
    results = [_results(folder / f"{engine}-{rank}.jsonl").get(check) for rank in range(processes)]
    failures = [f"rank {rank}: {result}" for rank, result in enumerate(results) if result not in ("passed", None)]
    if failures:
        return "\n".join(failures)
    if None in results:
        tail = "\n".join(log.read_text(errors="replace")[-1500:] for log in logs)
        return f"no result: {'a process ended before it' if ended else 'the group ran out of time'}\n{tail}"
    return "passed"


def _results(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["check"]: entry["result"] for entry in map(json.loads, lines)}
