"""The row of SequencePacker: a small causal language model on rows of several sequences."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tricks.data import SequencePacker, TricksDataLoader
from lightning_tricks.engines import engine_of
from tests.conformance.model import VOCABULARY, WIDTH, Block, Classifier, Sequences

if TYPE_CHECKING:
    from tests.conformance.cases import Outcome, Run

CAPACITY = 12
ROWS = 4  # to a global batch


class Predictor(Classifier):
    """Predicts each next token. The loss is the mean over the targets of all ranks' rows."""

    def __init__(self) -> None:
        super().__init__()
        del self.encoder, self.head
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CAPACITY, WIDTH)
        self.block, self.norm, self.tokens = Block(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.positions(position_ids)
        return self.tokens(self.norm(self.block(x, attention_mask[:, 0])))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches_seen += 1
        labels, engine = batch.pop("labels")[:, 1:], engine_of(self.trainer)
        targets = engine.sum_over_ranks((labels != -100).sum().float())
        logits = self(**batch)[:, :-1].float().transpose(1, 2)
        loss = F.cross_entropy(logits, labels, reduction="sum") * engine.world_size / targets
        self.log("train/loss", loss, on_step=True, on_epoch=False, sync_dist=True)
        self.log("train/targets", targets, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        tokens, _ = batch
        logits = self(tokens, *alone(tokens))[:, :-1].float().transpose(1, 2)
        losses = F.cross_entropy(logits, tokens[:, 1:], ignore_index=0, reduction="none")
        # A mean over sequences, of which ranks have equally many: of tokens they have not.
        loss = (losses.sum(1) / (tokens[:, 1:] != 0).sum(1)).mean()
        self.log("val/loss", loss, sync_dist=True, batch_size=len(tokens))


def alone(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions, and a mask that is causal and nothing else."""
    length = tokens.shape[1]
    hidden = torch.full((length, length), torch.finfo(torch.float32).min, device=tokens.device).triu(1)
    return torch.arange(length, device=tokens.device).expand(tokens.shape), hidden.expand(len(tokens), 1, -1, -1)


def documents(samples: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens} for tokens in Sequences(samples, seed=1).tokens]


def packed_loader(samples: int, world: int) -> TricksDataLoader:
    data, packer = documents(samples), SequencePacker(CAPACITY)
    rows = packer.pack(data, [len(document["input_ids"]) for document in data])
    return TricksDataLoader(rows, batch_size=ROWS // world, shuffle=True, seed=0, collate_fn=packer)


def sequence_packer() -> "Run":
    from tests.conformance.cases import Run

    return Run(Predictor(), loader=packed_loader)


def check_sequence_packer(outcome: "Outcome") -> None:
    data = documents(54)
    targets = outcome["logged"]["train/targets"]["values"].reshape(3, -1).sum(1)
    assert (targets == sum(len(document["input_ids"]) - 1 for document in data)).all(), "not every target once an epoch"
    model = Predictor()
    model.load_state_dict(outcome["weights"])
    batch: dict[str, Any] = next(iter(packed_loader(54, 1)))
    del batch["labels"]
    with torch.no_grad():
        packed, starts = model(**batch), (batch["position_ids"] == 0).nonzero().tolist()
        for (row, start), (after, end) in zip(starts, [*starts[1:], [len(packed), 0]], strict=True):
            tokens = batch["input_ids"][row : row + 1, start : end if after == row else CAPACITY]
            found = packed[row, start : start + tokens.shape[1]]
            assert torch.allclose(found, model(tokens, *alone(tokens))[0], atol=1e-5), "a sequence sees another"
    assert len(starts) > ROWS, "rows hold several sequences"
