"""The columns of the matrix, and the groups of processes that run them.

`Group` starts one process per rank and keeps them: importing torch, Lightning and DeepSpeed costs seconds, a case much
less. A job is a call of a top-level function on every rank. One that crashes, raises or hangs fails with the traceback
of each rank; the group is then killed, and the next call starts a fresh one.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]

# Engine -> its strategy flag and its number of processes.
ENGINES = {
    "one_device": ("auto", 1),
    "ddp": ("ddp", 2),
    "fsdp2": ("fsdp2", 2),
    "fsdp2_offload": ("fsdp2_offload", 2),
    "hsdp": ("hsdp", 2),
    "zero_1": ("zero_1", 2),
    "zero_2": ("zero_2", 2),
    "zero_2_offload": ("zero_2_offload", 2),
    "zero_3": ("zero_3", 2),
    "zero_3_offload": ("zero_3_offload", 2),
}
NODES = {"hsdp": 2}  # engines whose ranks are spread over machines, each played by processes of its own
# Flags that few machines can run: no columns, but tests of their own.
ELSEWHERE = {"zero_3_nvme": "tests/engines/test_nvme.py"}
PRECISIONS = ("32-true", "bf16-mixed")
REFERENCE = "one_device"

START_LIMIT = 120.0  # seconds until a fresh group has imported what it needs
CASE_LIMIT = 90.0  # seconds for one job
GRACE = 5.0  # seconds for the other ranks once one has failed: they may wait for it in a collective


class WorkerError(Exception):
    """A job failed on some rank; the message holds what each rank had to say."""


class Worker:
    """One process of a group, its log file, and what it has answered to the present job."""

    def __init__(self, rank: int, environment: dict[str, str], log: Path) -> None:
        self.rank = rank
        self.log = log
        self.reply = None
        self.ended = False
        self._line = b""
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.conformance.worker"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # its own process group: Ctrl-C reaches the tests only, and they clean up
            )

    def send(self, job: dict) -> None:
        self.reply, self.log_start = None, self.log.stat().st_size
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.ended = True

    def receive(self) -> None:
        """Read what there is; call it when `process.stdout` is readable."""
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        self._line += chunk
        if not chunk:
            self.ended = True
        elif self._line.endswith(b"\n"):
            self.reply, self._line = json.loads(self._line), b""

    @property
    def waiting(self) -> bool:
        return self.reply is None and not self.ended

    @property
    def failed(self) -> bool:
        return self.ended or (self.reply is not None and "error" in self.reply)

    def account(self, limit: float) -> str:
        """What became of the job, with this rank's traceback."""
        if self.reply is not None:
            return f"rank {self.rank}: {self.reply.get('error', 'done')}"
        if self.ended:
            what = f"ended with exit status {self.process.wait()}"
        else:
            what = f"did not answer within {limit:g} s; its threads were here"
            self._dump_threads()
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        return f"rank {self.rank} {what}:\n{text[-8000:]}"

    def _dump_threads(self) -> None:
        size = self.log.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + GRACE
        while self.log.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.2)  # the dump is written line by line

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Group:
    """As many processes as an engine has ranks, started as torchrun would, at the first call.

    Args:
        world: number of ranks; 1 starts a plain process, without torchrun's environment.
        folder: where the ranks' logs go.
        prepare: a function without arguments that a fresh group runs first, with `START_LIMIT`: imports, mostly.
        nodes: the number of machines that the ranks believe to be on, as many on each.
    """

    def __init__(self, world: int, folder: Path, prepare: str | None = None, nodes: int = 1) -> None:
        self.world = world
        self.nodes = nodes
        self.folder = folder
        self.prepare = prepare
        self.starts = 0
        self._workers: list[Worker] = []

    def call(self, function: str, *, limit: float = CASE_LIMIT, **arguments) -> list:
        """Run `module:function` with these JSON-able keyword arguments on every rank.

        Returns:
            What each rank returned.

        Raises:
            WorkerError: if any rank did not return within `limit` seconds.
        """
        if not self._workers:
            self._start()
        self._run({"function": function, "arguments": arguments}, limit)
        return [worker.reply["value"] for worker in self._workers]

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _start(self) -> None:
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        # The store takes a free port by itself, as torchrun's does: there is no port to lose to another process.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=1))
        self._workers = [
            Worker(rank, self._environment(rank), self.folder / f"rank{rank}.log") for rank in range(self.world)
        ]
        if self.prepare is not None:
            self._run({"function": self.prepare, "arguments": {}}, START_LIMIT)

    def _environment(self, rank: int) -> dict[str, str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        local = self.world // self.nodes
        if self.world > 1:
            environment |= {
                "RANK": f"{rank}",
                "LOCAL_RANK": f"{rank % local}",
                "GROUP_RANK": f"{rank // local}",
                "WORLD_SIZE": f"{self.world}",
                "LOCAL_WORLD_SIZE": f"{local}",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": f"{self._store.port}",
                "TORCHELASTIC_RUN_ID": "conformance",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
        return environment

    def _run(self, job: dict, limit: float) -> None:
        for worker in self._workers:
            worker.send(job)
        self._wait(limit)
        if any(worker.failed or worker.waiting for worker in self._workers):
            report = "\n".join(worker.account(limit) for worker in self._workers)
            self.close()
            raise WorkerError(f"{job['function']} {job['arguments']} failed:\n{report}")

    def _wait(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        while waiting := {worker.process.stdout: worker for worker in self._workers if worker.waiting}:
            if any(worker.failed for worker in self._workers):
                deadline = min(deadline, time.monotonic() + GRACE)
            readable, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            for stdout in readable:
                waiting[stdout].receive()
            if not readable:
                return


def free_port() -> int:
    """A port that nobody listens on now. Where a store can be passed on, as `Group` does, nothing can take it away."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
