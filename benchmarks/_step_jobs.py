"""What each process of `step_time.py` does: fits of an encoder under a preset, or Lightning's own of its kind.

Imports nothing of lightning_tricks by itself: one of the pairs measures what importing it costs.
"""

import argparse
import logging
import sys
import time
import warnings

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn

WORDS, WIDTH, BLOCKS, BATCH, LENGTH = 1000, 256, 2, 4, 32
WARM_UP, STEPS = 3, 12


def prepare():
    """Imports, without the package."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def prepare_with_package():
    prepare()
    import lightning_tricks  # noqa: F401


def steps(strategy: str) -> list[float]:
    """CPU seconds that this process spends in each of `STEPS` whole steps."""
    if ("lightning_tricks" in sys.modules) == (strategy == "bare"):
        raise RuntimeError("the sides of the pair that measures the import are mixed up")
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=chosen(strategy),
        max_steps=WARM_UP + STEPS + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock],
    )
    trainer.fit(ShardsItself() if strategy == "ModelParallelStrategy" else Model())
    return [after - before for before, after in zip(clock.starts, clock.starts[1:], strict=False)][WARM_UP:]


def chosen(strategy):
    if strategy in ("bare", "imported"):
        return "ddp"
    if strategy == "ModelParallelStrategy":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if strategy.startswith("DeepSpeedStrategy"):
        return DeepSpeedOnCPU(stage=int(strategy[-1]))
    return strategy


class Clock(L.Callback):
    """When each step began, in CPU time of all threads of this process."""

    def __init__(self):
        self.starts = []

    def on_train_batch_start(self, *_):
        self.starts.append(time.process_time())


class Model(L.LightningModule):
    """A transformer encoder that classifies tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        tokens = torch.randint(0, WORDS, (64 * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(tokens, batch_size=BATCH)


class ShardsItself(Model):
    """The same `fully_shard` calls, as `ModelParallelStrategy` wants them."""

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh, reshard_after_forward=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's own, with the check for CUDA skipped and the rank named where it takes a GPU's index."""

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        from lightning_tricks.engines._zero_machine import gloo_only, use_cpu

        self.set_world_ranks()
        use_cpu()
        with gloo_only():
            self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped
