"""Small models of four kinds and 20 AdamW steps of each: what every engine must train alike.

Used by `test_equivalence.py` and by `benchmarks/equivalence.py`. AdamW makes whole steps of any gradient, so nothing is
compared whose gradient is rounding alone: no bias comes before a batch normalisation, and the bias of an attention's
keys, which softmax does not see, is left out (`_decided`).
"""

import math
import os
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lightning_tricks  # noqa: F401  (registers the flags)
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.engines import ZeroStrategy, engine_of, ranks
from lightning_tricks.strategies import PRESETS
from tests.conformance.engines import ELSEWHERE
from tests.conformance.model import Encoder
from tests.orders import kept_shuffle

ENGINES = tuple(flag for flag in PRESETS if flag not in ELSEWHERE)
WORDS, WIDTH, LENGTH = 24, 18, 6
BATCH, STEPS = 8, 20


class Task(L.LightningModule):
    """Random data that can be learned by heart, the same global batches on any number of ranks."""

    compares_with_one_device = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)

    def start(self, seed: int) -> None:
        """Take other first weights. No bias begins at zero: beside 20 small steps, one of other sign would be all."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            size = 0.1 if parameter.dim() == 1 else 0.02
            parameter.data += size * torch.randn(parameter.shape, generator=generator)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs).float().flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def data(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _tokens(samples, generator), torch.randint(0, 3, (samples,), generator=generator)

    def train_dataloader(self) -> TricksDataLoader:
        data = TensorDataset(*self.data(BATCH * STEPS, torch.Generator().manual_seed(3)))
        return kept_shuffle(data, batch_size=BATCH // ranks()[1], seed=5)


class Transformer(Task):
    """An encoder of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens))


class TiedLSTM(Task):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.output = nn.Linear(WIDTH, WORDS)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(tokens))[0])

    def data(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = _tokens(samples, generator, LENGTH + 1)
        return tokens[:, :-1], tokens[:, 1:]


class Attention(Task):
    """Built of `nn.MultiheadAttention`, which uses its output layer's weight without calling that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([AttentionBlock(), AttentionBlock()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 3, batch_first=True)
        self.mix = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mix(x)


class ConvNet(Task):
    """Batch normalisation in training: its statistics are those of a rank's own samples, as under DDP."""

    compares_with_one_device = False

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 10), (10, 13), (13, 13))
        self.convolutions = nn.ModuleList(nn.Conv2d(*size, 3, padding=1, bias=False) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for _, size in sizes)
        self.head = nn.Linear(13, 3)
        for norm in self.norms:
            nn.init.normal_(norm.running_mean, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(x)).relu()
        return self.head(x.mean((2, 3)))

    def data(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = torch.randn(samples, 3, 8, 8, generator=generator)
        return images, torch.randint(0, 3, (samples,), generator=generator)


class FrozenConvNet(ConvNet):
    """Batch normalisation with fixed statistics, its weights trained: the same on any number of ranks."""

    compares_with_one_device = True

    def on_train_epoch_start(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


MODELS = {
    "transformer": Transformer,
    "LSTM, tied embeddings": TiedLSTM,
    "nn.MultiheadAttention": Attention,
    "convnet, batch norm": ConvNet,
    "convnet, batch norm fixed": FrozenConvNet,
}


# -- jobs ----------------------------------------------------------------------------------------------------------


def prepare() -> None:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def train(engine: str, precision: str, model: str, seed: int, folder: str) -> dict[str, bool]:
    """Take the 20 steps; rank 0 leaves the whole weights in `folder`.

    Returns:
        Whether tied weights are still one parameter on this rank.
    """
    module = MODELS[model]()
    module.start(seed)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy_of(engine),
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module)
    assert trainer.global_step == STEPS
    weights = {name: value.clone() for name, value in engine_of(trainer).named_full_weights()}
    if trainer.is_global_zero:
        torch.save(weights, path_of(Path(folder), engine, precision, model, seed))
    return {"tied": not isinstance(module, TiedLSTM) or module.output.weight is module.embedding.weight}


def strategy_of(engine: str):
    """The flag's strategy; ZeRO-3 divides small parameters too, which it would otherwise keep whole."""
    if engine not in PRESETS:
        return {"one_device": "auto"}.get(engine, engine)
    strategy = PRESETS[engine].function(**PRESETS[engine].arguments)
    if isinstance(strategy, ZeroStrategy) and strategy.zero_stage_3:
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return strategy


# -- comparing -----------------------------------------------------------------------------------------------------


def path_of(folder: Path, engine: str, precision: str, model: str, seed: int) -> Path:
    return folder / f"{engine} {precision} {model} {seed}.pt"


def distance(folder: Path, model: str, seed: int, one: tuple[str, str], other: tuple[str, str]) -> float:
    """The largest difference of (engine, precision) `one` from `other`, relative to each tensor's largest value."""
    found, expected = (torch.load(path_of(folder, *each, model, seed)) for each in (one, other))
    assert found.keys() == expected.keys()
    assert all(value.isfinite().all() for value in found.values())
    return max(_relative(_decided(name, found[name]), _decided(name, expected[name])) for name in expected)


def _relative(found: Tensor, expected: Tensor) -> float:
    size = expected.double().abs().max().item()
    off = (found.double() - expected.double()).abs().max().item()
    return off / size if size else math.inf if off else 0.0


def _decided(name: str, value: Tensor) -> Tensor:
    if not name.endswith("in_proj_bias"):
        return value
    query, _, last = value.chunk(3)
    return torch.cat([query, last])


def _tokens(samples: int, generator: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(1, WORDS, (samples, length), generator=generator)
