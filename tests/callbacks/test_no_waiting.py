"""Nothing waits for the device inside a step: every value that is read back from it is counted."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tricks.callbacks import (
    FixedNorm,
    GradientClipping,
    GradientNormMonitor,
    NonFiniteGuard,
    Percentile,
    UnitwiseAdaptive,
    Value,
    ZScore,
)
from tests.callbacks.guard_jobs import Spoilt

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "is_nonzero")
HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


class Reads(TorchFunctionMode):
    """Notes what reads a value back, as Python asks for it, and as torch itself does: one CPU hides `.cpu()`."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.below = _Below(self.found)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        # A device in a variable is the one that trains, here a CPU as well; only the word is a way back to the host.
        to_host = name == "to" and any(isinstance(each, str) and each == "cpu" for each in args[1:])
        if name in READS or to_host:
            self.found.append(name)
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.below.__enter__()
        return super().__enter__()

    def __exit__(self, *reason):
        super().__exit__(*reason)
        self.below.__exit__(*reason)


class _Below(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


def watched(callback, reads):
    """The callback, each of whose hooks within a step is watched."""

    def watch(hook):
        def run(*arguments):
            with reads:
                return hook(*arguments)

        return run

    for name in HOOKS:
        setattr(callback, name, watch(getattr(callback, name)))
    return callback


def reads_in_a_fit(trainer, callback, module=None, **options):
    reads = Reads()
    run = trainer([watched(callback, reads)], **{"max_epochs": 1, "limit_val_batches": 0, **options})
    run.fit(module or Spoilt())
    assert run.global_step == 8
    return reads.found


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: x.cpu(),
        lambda x: bool(x),
        lambda x: x.tolist(),
        lambda x: x.to("cpu"),
        lambda x: 1.0 if x > 0 else 0.0,
        lambda x: torch.zeros(3)[x.long()],
    ],
    ids=["item", "cpu", "bool", "tolist", "to", "if", "index"],
)
def test_reads_are_noticed(read):
    with Reads() as reads:
        read(torch.ones(()))
    assert reads.found


@pytest.mark.parametrize(
    "policy",
    [
        FixedNorm(1.0),
        Percentile(50, window=8, warmup=2),
        ZScore(2.0, warmup=2),
        Value(0.01),
        UnitwiseAdaptive(0.01, exclude=["head"]),
        {"blocks": 0.1, "head": Percentile(50, window=8, warmup=2), "*": Value(0.01)},
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_clipping_reads_nothing(trainer, policy):
    assert reads_in_a_fit(trainer, GradientClipping(policy)) == []


def test_the_monitor_reads_nothing_but_what_64_steps_left(trainer):
    assert reads_in_a_fit(trainer, GradientNormMonitor(groups=["head", "blocks"], update_ratio_every=2)) == []


def test_the_guard_reads_once_a_step(trainer):
    """Whether to step must be known before the step: the wait is inherent."""
    assert reads_in_a_fit(trainer, NonFiniteGuard()) == ["tolist"] * 8
