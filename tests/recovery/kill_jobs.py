"""Whole groups killed at a moment of their fit, and resumed, as jobs that a `Group` runs on every rank.

A rank of the `Group` imports what is needed, once, and forks a process for every fit: it is that one which is killed.
Its moments are counted on rank 0: every hook of a step, every validation batch, and every change of the disk that a
save makes there. At the chosen one it waits to be killed, or goes on for the few milliseconds until it is.
"""

import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import lightning as L
import torch

from lightning_tricks.callbacks import EMA, WeightAveraging
from lightning_tricks.cli.resume import newest_checkpoint
from lightning_tricks.engines import engine_of
from lightning_tricks.engines._weights import WeightsEngine
from tests.conformance.worker import die_with
from tests.engines.checks import Run, weights_of
from tests.engines.full_disk_jobs import Validated
from tests.engines.option_jobs import prepare as quieten

NAME = "last.ckpt"
BATCHES, STEPS = 4, 7  # so that the last steps are in the second epoch
LIMIT = 60.0  # seconds for a fit


def prepare() -> None:
    """Import what the forked processes need. Nothing here may start a thread or a process group."""
    quieten()
    needed = ["omegaconf", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict_saver"]
    if importlib.util.find_spec("deepspeed") is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        needed += ["deepspeed", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.zero.stage3"]
    for name in needed:
        importlib.import_module(name)


def fit(
    engine: str, folder: str, port: int, moment: int | None = None, delay: float = 0.0, averaging: bool = False
) -> list[int] | None:
    """Fit in a forked process, from the newest checkpoint if there is one.

    Args:
        engine: a key of the matrix's engines.
        folder: where the run writes.
        port: a free one, for the group of this very fit to meet at.
        moment: at which of its moments rank 0 is to be killed, and all others with it; None to let it end.
        delay: how long after that moment, in seconds.
        averaging: average the weights too, and save in validations as well.

    Returns:
        On rank 0, of a fit that ended: the moments in its saves, and how many moments there were in all.
    """
    rank = int(os.environ.get("RANK", 0))
    if engine == "one_device" and rank > 0:
        return None
    place = Path(folder)
    child = os.fork()
    if child == 0:
        _child(engine, place, port, moment, delay, averaging)
    (place / f"pid{rank}-{port}").write_text(str(child))
    if moment is not None and rank == 0:
        world = 1 if engine == "one_device" else 2
        _kill_all([place / f"pid{other}-{port}" for other in range(world)], place, delay)
    status, expected = _ended(child), 0 if moment is None else -signal.SIGKILL
    assert status == expected, f"the fit ended with {status}, not {expected}: see the log"
    return json.loads((place / "moments").read_text()) if rank == 0 and moment is None else None


def _kill_all(written: list[Path], place: Path, delay: float) -> None:
    deadline = time.monotonic() + LIMIT
    while not ((place / "moment").exists() and all(path.exists() and path.read_text() for path in written)):
        assert time.monotonic() < deadline, "the moment did not come: see the log"
        time.sleep(0.0005)
    time.sleep(delay)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once: none sees another one die
        for path in written:
            os.kill(int(path.read_text()), number)


def _ended(child: int) -> int:
    deadline = time.monotonic() + LIMIT
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _child(engine: str, place: Path, port: int, moment: int | None, delay: float, averaging: bool) -> None:
    status = 1
    try:
        threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
        if engine == "one_device":
            for name in [name for name in os.environ if name == "RANK" or "WORLD" in name or "LOCAL_RANK" in name]:
                del os.environ[name]
        os.environ["MASTER_PORT"] = str(port)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # which knows the last fit's addresses
        _train(engine, place, moment, delay, averaging)
        while moment is not None:  # a fit that is faster than its delay: it is killed at its very end
            time.sleep(1)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _train(engine: str, place: Path, moment: int | None, delay: float, averaging: bool) -> None:
    run = Run(engine, place)
    moments = Moments(place, moment if run.rank == 0 else None, blocks=delay == 0)
    if run.rank == 0:
        moments.count_changes_of_the_disk()
        moments.count_swaps()
    found = newest_checkpoint([place])
    options = {"max_steps": STEPS, "max_epochs": -1, "val_check_interval": 3}
    saver, average = Saver(place / NAME, averaging), [WeightAveraging(EMA(0.5))] if averaging else []
    trainer = run.trainer(moments, saver, *average, **options)
    trainer.fit(Validated(batches=BATCHES), ckpt_path=None if found is None else str(found))
    assert trainer.global_step == STEPS
    weights = weights_of(trainer)
    if run.rank == 0:
        (place / "moments").write_text(json.dumps([*moments.saving, moments.count]))
        (place / "swaps").write_text(json.dumps(moments.swaps))
        torch.save(weights, place / "weights.pt")


class Saver(L.Callback):
    """Saves under one name, over the one before, after every other step; that is in mid-epoch."""

    def __init__(self, path: Path, validations: bool = False) -> None:
        self.path, self.validations = path, validations

    def setup(self, trainer, pl_module, stage):
        engine_of(trainer)  # as any trick does

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step % 2 == 0:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer, *rest):
        if self.validations and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


class Moments(L.Callback):
    """Counts the moments of a fit, and says when the chosen one has come."""

    def __init__(self, place: Path, chosen: int | None, blocks: bool) -> None:
        self.place, self.chosen, self.blocks = place, chosen, blocks
        self.count, self.saving, self.swaps = 0, [], []

    def pass_one(self, *_) -> None:
        self.count += 1
        if self.count - 1 == self.chosen:
            (self.place / "moment").touch()
            while self.blocks:
                time.sleep(1)

    on_train_batch_start = on_before_backward = on_after_backward = on_before_optimizer_step = pass_one
    on_before_zero_grad = on_train_batch_end = on_validation_batch_start = on_validation_end = pass_one

    def count_changes_of_the_disk(self) -> None:
        """Before each: files opened to write, renamed, flushed to the disk; folders made and removed."""
        real = {"fsync": os.fsync, "save": torch.save}

        def fsync(descriptor):
            self._pass_in_save()
            return real["fsync"](descriptor)

        def save(*arguments, **options):
            self._pass_in_save()
            return real["save"](*arguments, **options)

        os.fsync, torch.save = fsync, save
        sys.addaudithook(self._audit)

    def count_swaps(self) -> None:
        """Before and after other weights are put into the module."""
        real = WeightsEngine.put_shards

        def put_shards(engine, values):
            self.swaps.append(self.count)
            self.pass_one()
            real(engine, values)
            self.swaps.append(self.count)
            self.pass_one()

        WeightsEngine.put_shards = put_shards

    def _audit(self, event, arguments) -> None:
        writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        writes |= event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if writes and NAME in str(arguments[0]):
            self._pass_in_save()

    def _pass_in_save(self) -> None:
        self.saving.append(self.count)
        self.pass_one()
