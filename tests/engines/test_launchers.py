"""The same script on two machines, played by two processes of this one, under each launcher."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lightning_tricks.strategies import PRESETS
from tests.conformance.engines import ELSEWHERE, ROOT, free_port
from tests.engines.checks import Net, Probe, Run, fit, float_weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
RUNNABLE = [flag for flag in PRESETS if flag not in ELSEWHERE]
FLAGS = ["ddp", *(flag for flag in RUNNABLE if HAS_DEEPSPEED or not flag.startswith("zero"))]
SOME = [flag for flag in ("ddp", "fsdp2", "hsdp", "zero_2") if flag in FLAGS]
SCRIPT = "tests.engines.launched"
LIMIT = 180.0  # seconds: two processes that import everything at once, on a busy machine


def under_torchrun(node: int, port: int, script: list[str]) -> tuple[list[str], dict[str, str]]:
    agent = ["torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1"]
    return [*agent, "--master-addr=127.0.0.1", f"--master-port={port}", "-m", *script], {}


def under_slurm(node: int, port: int, script: list[str]) -> tuple[list[str], dict[str, str]]:
    """What `srun` sets for one task on each of two machines."""
    job = {"JOB_ID": "1234", "JOB_NAME": "train", "NTASKS": "2", "NNODES": "2", "NTASKS_PER_NODE": "1"}
    task = {"PROCID": f"{node}", "NODEID": f"{node}", "LOCALID": "0", "NODELIST": "127.0.0.1"}
    slurm = {f"SLURM_{name}": value for name, value in {**job, **task}.items()}
    return script, {**slurm, "MASTER_PORT": f"{port}"}


def by_lightning(node: int, port: int, script: list[str]) -> tuple[list[str], dict[str, str]]:
    return script, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "NODE_RANK": f"{node}"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The weights and the norms of one device."""
    probe = Probe(limit=0.5)
    trainer = fit(Run("one_device", tmp_path_factory.mktemp("one")), Net(batches=4), probe, max_epochs=1)
    return float_weights(trainer), probe.norms


@pytest.mark.parametrize(("launcher", "flags"), [(under_torchrun, FLAGS), (under_slurm, SOME), (by_lightning, SOME)])
def test_two_machines_do_what_one_device_does(launcher, flags, reference, tmp_path):
    port, script = free_port(), [SCRIPT, "1", "2", f"{tmp_path}", *flags]
    start([launcher(node, port, script) for node in (0, 1)], tmp_path)
    for flag in flags:
        compare(torch.load(tmp_path / f"{flag}.pt"), reference, copies=2 if flag == "hsdp" else 1)


def test_two_processes_of_lightnings_own_launcher_do_what_one_device_does(reference, tmp_path):
    start([([SCRIPT, "2", "1", f"{tmp_path}", *SOME], {})], tmp_path)
    for flag in SOME:
        compare(torch.load(tmp_path / f"{flag}.pt"), reference, copies=1)


def compare(found, reference, copies: int) -> None:
    weights, norms = reference
    assert (found["ranks"], found["copies"]) == (2, copies)
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    assert found["weights"].keys() == weights.keys()
    for name, value in weights.items():
        assert (found["weights"][name] - value).abs().max() <= 2e-5 * value.abs().max(), name


def start(machines, folder) -> None:
    """Run each machine's command and wait for all; a failure shows the last words of each."""
    logs = [folder / f"machine{node}.log" for node in range(len(machines))]
    running = [launch(*machine, log) for machine, log in zip(machines, logs, strict=True)]
    deadline = time.monotonic() + LIMIT
    try:
        ended = [wait(process, deadline) for process in running]
    finally:
        for process in running:
            end(process)
    assert ended == [0] * len(machines), "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)


def launch(arguments, settings, log) -> subprocess.Popen:
    known = ("SLURM_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "NODE_RANK")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(known)}
    environment = {**plain, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}", **settings}
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(process, deadline: float) -> int | str:
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT:g} s"


def end(process) -> None:
    """End it and what it started; an agent ends its own when asked to."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
