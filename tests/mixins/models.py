"""A small model to adapt."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_tricks.data import TricksDataLoader
from lightning_tricks.layers import adapted_layers
from lightning_tricks.mixins import AdapterMixin, LoRA, LoRAMixin

# What Lightning says of a run that is resumed without its ModelCheckpoint.
QUIET = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Block(nn.Module):
    """Two projections, a norm, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.register_buffer("gain", torch.ones(6))

    def forward(self, x):
        return x + self.gain.to(x.dtype) * self.norm(F.relu(self.value(torch.tanh(self.query(x))), inplace=True))


class Encoder(nn.Module):
    """Two blocks and a pooler."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.ModuleList([Block(), Block()])
            self.pooler = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.layer:
            x = block(x)
        return self.pooler(x)


class Classifier(LoRAMixin, L.LightningModule):
    """A frozen encoder with adapters, and a head. `base_seed` stands for the pretrained weights."""

    def __init__(self, base_seed: int = 0, rank: int = 2, alpha: float = 4.0, trainable: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = Encoder(base_seed)
        self.head = nn.Linear(6, 4)
        self.adapt(self.encoder, LoRA(rank=rank, alpha=alpha), trainable=trainable)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x).float(), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        x, y = torch.randn(24, 6, generator=generator), torch.randint(0, 4, (24,), generator=generator)
        return TricksDataLoader(TensorDataset(x, y), batch_size=4 // self.trainer.world_size, shuffle=False, seed=0)


def trainer(**options) -> L.Trainer:
    """A Trainer that says nothing."""
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "enable_checkpointing": False} | options
    return L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, **options)


class Holder(AdapterMixin, L.LightningModule):
    """Any module, adapted."""

    def __init__(self, net, policy=None, **options):
        super().__init__()
        self.net = net
        if policy is not None:
            self.adapt(self.net, policy, **options)


def moved(module):
    """Its adapters away from their start."""
    for _, layer in adapted_layers(module):
        for name in layer.adapters:
            for parameter in layer.adapter_parameters(name).values():
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return module
