"""What every row trains: a small transformer that classifies token sequences, and the sequences."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_tricks.data import TricksDataLoader
from lightning_tricks.engines import engine_of
from tests.orders import kept_shuffle

VOCABULARY = 24
WIDTH = 18
CLASSES = 3
GLOBAL_BATCH = 8
SHARES = (0.65, 0.25, 0.1)  # of the classes: the data are imbalanced


class Sequences(Dataset):
    """Token sequences of 3 to 9 tokens, most of which hint at the class. Token 0 pads."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.multinomial(torch.tensor(SHARES), samples, replacement=True, generator=generator)
        self.tokens = [self._sequence(int(label), generator) for label in self.labels]

    @staticmethod
    def _sequence(label: int, generator: torch.Generator) -> Tensor:
        length = int(torch.randint(3, 10, (), generator=generator))
        anything = torch.randint(1, VOCABULARY, (length,), generator=generator)
        hints = torch.randint(1 + 7 * label, 8 + 7 * label, (length,), generator=generator)
        return torch.where(torch.rand(length, generator=generator) < 0.4, hints, anything)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index], self.labels[index]


def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ragged sequences, padded to the longest of the batch."""
    tokens, labels = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(list(tokens), batch_first=True), torch.stack(labels)


def loader(samples: int, seed: int, *, shuffle: bool = True, world: int = 1) -> TricksDataLoader:
    """The same global batches for any number of ranks: each rank's batch is its share of them."""
    data, size = Sequences(samples, seed), GLOBAL_BATCH // world
    return kept_shuffle(data, batch_size=size, shuffle=shuffle, seed=0, collate_fn=collate)


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm, as in any encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # its bias has no gradient: softmax does not see it
        self.value = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm_attention(x)
        x = x + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h), attn_mask=mask)
        return x + self.down(F.gelu(self.up(self.norm_feed_forward(x))))


class Encoder(nn.Module):
    """Tokens of shape (batch, length) to one vector per sequence, of shape (batch, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, real[:, None, :])
        weights = real.to(x.dtype).unsqueeze(-1)
        return (self.norm(x) * weights).sum(1) / weights.sum(1)


class Classifier(L.LightningModule):
    """The module of row Plain; other rows subclass it. No dropout: ranks would draw other masks than one device."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch. Its mean over ranks is that of the global batch if the ranks' parts are equal."""
        return F.cross_entropy(logits.float(), labels)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        self.batches_seen += 1
        loss = self.loss(self(tokens), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=False, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        tokens, labels = batch
        loss = F.cross_entropy(self(tokens).float(), labels)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up(optimizer), "interval": "step"}}


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Six steps of warm-up, and decay from then on."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 6) * 0.97**step)


def full_weights(trainer: L.Trainer) -> dict[str, Tensor]:
    """What a checkpoint of the module holds, whole, as copies. Collective."""
    return {name: tensor.clone() for name, tensor in engine_of(trainer).named_full_weights()}
