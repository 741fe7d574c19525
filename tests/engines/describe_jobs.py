"""What an engine reports about itself, held against what happens: jobs that a `Group` runs on every rank."""

import gc
import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.engines import engine_of
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.strategies import describe
from tests.engines.checks import Run
from tests.engines.option_jobs import prepare  # noqa: F401  (what a fresh group runs first)

WIDTH, BATCHES = 160, 4
SLACK = 20_000  # bytes: the batch, the loss, step counters, norms
# Bytes per parameter on 2 ranks, before the second step: parameters, masters, gradients, optimizer state.
EXPECTED = {
    "32-true": {
        "one_device": (4, 0, 4, 8),
        "ddp": (4, 0, 4, 8),
        "fsdp2": (2, 0, 2, 4),
        "zero_1": (4, 0, 2, 4),
        "zero_2": (4, 0, 2, 4),
        "zero_3": (2, 0, 2, 4),
        "fsdp2_offload": (2, 0, 2, 4),
        "zero_2_offload": (4, 2, 2, 4),
        "zero_3_offload": (2, 2, 4, 4),  # DeepSpeed keeps its gradient buffer beside the gradients of the host
    },
    "bf16-mixed": {
        "one_device": (4, 0, 4, 8),
        "ddp": (4, 0, 4, 8),
        "fsdp2": (2, 0, 2, 4),
        "zero_1": (2, 2, 1, 4),
        "zero_2": (2, 2, 1, 4),
        "zero_3": (1, 2, 1, 4),
    },
    "bf16-true": {"one_device": (2, 0, 2, 4), "ddp": (2, 0, 2, 4), "fsdp2": (1, 0, 1, 2), "zero_2": (2, 2, 1, 4)},
}


class Wide(L.LightningModule):
    """Two blocks, a buffer, float targets; notes what dtypes pass by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        block = [nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)]
        self.blocks = nn.ModuleList([nn.Sequential(*block), nn.Sequential(*[type(p)(*_sizes(p)) for p in block])])
        self.register_buffer("offset", torch.zeros(1000))
        self.seen = {"compute": set(), "batch": set()}
        self.blocks[0][0].register_forward_hook(lambda *call: self.seen["compute"].add(call[-1].dtype))

    def training_step(self, batch, index):
        inputs, targets = batch
        self.seen["batch"] |= {inputs.dtype, targets.dtype}
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return nn.functional.mse_loss(inputs.float(), targets.float())

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(2 * BATCHES, WIDTH), torch.randn(2 * BATCHES, WIDTH)), batch_size=1)

    test_dataloader = train_dataloader


def _sizes(part):
    return (part.in_features, part.out_features) if isinstance(part, nn.Linear) else ()


class OwnSharding(Wide):
    """Shards itself, for Lightning's `ModelParallelStrategy`, under no policy."""

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.blocks[0], FSDPModule):
            for block in self.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])


class Asks(L.Callback):
    """Asks once, before the second step, and measures at the same time in its own way."""

    def __init__(self, before: int) -> None:
        self.before = before

    def setup(self, trainer, pl_module, stage):
        with pytest.raises(MisconfigurationError, match=r"does not exist yet.*`on_fit_start`"):
            describe(trainer)

    def on_fit_start(self, trainer, pl_module):
        self.start = describe(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1:
            self.found = describe(trainer)
            self.measured = living() - self.before


def living() -> int:
    """The bytes of all tensors that Python knows of, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    storages = {}
    with torch.no_grad():
        for tensor in tensors:
            grad = tensor.grad if tensor.is_leaf else None
            for each in (tensor, grad):
                local = each.to_local() if hasattr(each, "to_local") else each
                if local is not None and local.device.type == "cpu":
                    storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def trainer_of(engine: str, folder: str, precision: str, *callbacks, **options) -> L.Trainer:
    options = {"precision": precision, "max_steps": 2, "use_distributed_sampler": False, **options}
    return Run(engine, Path(folder)).trainer(*callbacks, **options)


# -- bytes ---------------------------------------------------------------------------------------------------------


def allocated(engine: str, folder: str, precision: str) -> None:
    """The bytes are those that live tensors have, and each kind is as large as it must be."""
    before, module = living(), Wide()
    asks = Asks(before)
    trainer = trainer_of(engine, folder, precision, asks)
    trainer.fit(module)
    found = asks.found.memory
    beyond_python = found.engine["buckets"].total if engine == "ddp" else 0  # DDP's reducer holds them in C++
    assert abs(found.total.total - beyond_python - asks.measured) < SLACK, (found, asks.measured)
    elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
    kinds = (found.parameters, found.masters, found.gradients, found.optimizer)
    for kind, wanted in zip(kinds, EXPECTED[precision][engine], strict=True):
        assert kind.total == pytest.approx(wanted * elements, rel=0.02, abs=64), found
    assert found.buffers.total == (2000 if precision == "bf16-true" else 4000)
    if engine == "ddp":
        assert beyond_python == found.gradients.total
    assert asks.start.memory.optimizer is None
    kept = engine.startswith("zero_3") or engine == "zero_2_offload"  # gradient buffers that are there from the start
    assert (asks.start.memory.gradients is not None) == kept


# -- dtypes --------------------------------------------------------------------------------------------------------


def dtypes(engine: str, folder: str, precision: str, own: bool = False) -> None:
    """What is reported is what a layer returns, what a step is given, and what the ranks exchange."""
    module = OwnSharding() if own and engine == "fsdp2" else Wide()
    recorder, options = Recorder(), {}
    if own:
        options["strategy"] = DDPStrategy() if engine == "ddp" else ModelParallelStrategy(2, 1)
    trainer = trainer_of(engine, folder, precision, recorder, **options)
    trainer.fit(module)
    found = recorder.found
    assert found.parameters == tuple({parameter.dtype for parameter in module.parameters()})
    assert set(found.compute) == module.seen["compute"]
    assert set(found.reduction) == recorder.reduced
    assert ("its float tensors become bf16" in found.batch) == (module.seen["batch"] == {torch.bfloat16})
    assert ("casts its float inputs to bf16" in found.batch) == (
        engine == "fsdp2" and precision == "bf16-mixed" and not own
    )
    if engine.startswith("zero"):
        assert found.masters == (torch.float32,)
        assert {master.dtype for master in recorder.stepped} == {torch.float32}


class Recorder(L.Callback):
    """Notes the dtype of every large tensor that is reduced over the ranks in a backward, and what is stepped."""

    def __init__(self) -> None:
        self.reduced, self.stepped = set(), []

    def on_fit_start(self, trainer, pl_module):
        self.found = describe(trainer).precision
        if hasattr(trainer.strategy.model, "register_comm_hook"):
            trainer.strategy.model.register_comm_hook(None, self._bucket)
            assert describe(trainer).precision.reduction is None  # nobody knows what this hook does
        for optimizer in trainer.optimizers:
            inner = getattr(optimizer, "optimizer", None)
            if isinstance(inner, torch.optim.Optimizer):
                inner.register_step_pre_hook(lambda own, *_: self.stepped.extend(own.param_groups[0]["params"]))

    def _bucket(self, state, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.reduced.add(bucket.buffer().dtype)
        return allreduce_hook(None, bucket)

    def on_before_backward(self, *_):
        self.listening = Listening(self.reduced)
        self.listening.__enter__()

    def on_after_backward(self, *_):
        self.listening.__exit__(None, None, None)


class Listening(TorchDispatchMode):
    """Notes the dtypes of what the ranks sum, whoever asks for it."""

    def __init__(self, reduced: set[torch.dtype]) -> None:
        super().__init__()
        self.reduced = reduced

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "reduce" in function.__name__:
            large = [item for item in tree_leaves(args) if isinstance(item, torch.Tensor) and item.numel() > 1000]
            self.reduced |= {item.dtype for item in large}
        return function(*args, **(kwargs or {}))


# -- words ---------------------------------------------------------------------------------------------------------


def said(engine: str, folder: str) -> None:
    """One line in the log, from rank 0; and an evaluation and a finished fit can be described too."""
    module, lines = Wide(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        trainer = trainer_of(engine, folder, "32-true")
        trainer.fit(module)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    ours = [line for line in lines if line.startswith(f"{engine} on 2 ranks: parameters fp32, masters ")]
    assert len(ours) == (engine_of(trainer).rank == 0), lines
    if ours:
        assert "computes in fp32, reduces in fp32; per rank " in ours[0]
    text = str(describe(trainer))
    assert f"engine           {engine} on 2 ranks" in text
    assert "optimizer state  " in text
    shown = Shows()
    trainer_of(engine, folder, "32-true", shown).test(module, verbose=False)
    assert shown.found.memory.parameters.total > 0
    assert shown.found.memory.optimizer is None


class Shows(L.Callback):
    def on_test_batch_end(self, trainer, *_):
        self.found = describe(trainer)
