"""Rows of the data tricks. Their loaders give one device the global batches of two ranks."""

from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tricks.callbacks import SequenceLengthWarmup
from lightning_tricks.data import ClassBalancedSampler, FeatureNormalizer, LengthBucketSampler, TricksDataLoader
from lightning_tricks.data._plan import Plan
from lightning_tricks.engines import engine_of
from tests.conformance.model import Classifier, Sequences, collate

if TYPE_CHECKING:
    from tests.conformance.cases import Outcome, Run

RANKS = 2  # of the matrix's engines, whose batches one device takes together
BUDGET = 24
EPOCHS = 3


class Together:
    """A sampler whose plan on one device is that of two ranks, each step's parts in one."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def steps(self, world: int, limit: int) -> int:
        return self._sampler.steps(RANKS, limit)

    def plan(self, world: int, limit: int, *rest: Any) -> Plan:
        return self._sampler.plan(RANKS, limit, *rest)


class Counting(Classifier):
    """The mean loss over the global batch, however unevenly ranks share it; counts how often each sample comes."""

    def __init__(self, samples: int = 54) -> None:
        super().__init__()
        self.known = {tuple(row.tolist()): index for index, row in enumerate(Sequences(samples, seed=1).tokens)}
        assert len(self.known) == samples, "samples must be told apart"
        self.register_buffer("taken", torch.zeros(EPOCHS, samples, dtype=torch.int64))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        self.batches_seen += 1
        engine = engine_of(self.trainer)
        rows = torch.tensor([self.known[tuple(row[row != 0].tolist())] for row in tokens], device=tokens.device)
        taken = engine.sum_over_ranks(F.one_hot(rows, self.taken.shape[1]).sum(0).float())
        self.taken[self.current_epoch] += taken.long()
        loss = F.cross_entropy(self(tokens).float(), labels, reduction="sum") * engine.world_size / taken.sum()
        self.log("train/loss", loss, on_step=True, on_epoch=False, sync_dist=True)
        self.log("train/samples", taken.sum(), on_step=True, on_epoch=False)
        return loss


def taken_in_each_epoch(outcome: "Outcome") -> list[list[int]]:
    """How often each sample came, of shape (epochs, samples)."""
    assert len(outcome["logged"]["train/samples"]["values"].unique()) > 2, "batches by tokens hold unequal numbers"
    return outcome["weights"]["taken"].tolist()


def loader_with(sampler: Any, data: Sequences, world: int) -> TricksDataLoader:
    return TricksDataLoader(data, sampler=sampler if world == RANKS else Together(sampler), collate_fn=collate)


def buckets(data: Sequences) -> LengthBucketSampler:
    return LengthBucketSampler([len(row) for row in data.tokens], max_tokens=BUDGET, window=2)


# -- LengthBucketSampler -----------------------------------------------------------------------------------------------


def bucket_loader(samples: int, world: int) -> TricksDataLoader:
    data = Sequences(samples, seed=1)
    return loader_with(buckets(data), data, world)


def length_bucket_sampler() -> "Run":
    from tests.conformance.cases import Run

    return Run(Counting(), loader=bucket_loader)


def check_length_bucket_sampler(outcome: "Outcome") -> None:
    assert taken_in_each_epoch(outcome) == [[1] * 54] * EPOCHS, "an epoch is not every sample once"


# -- ClassBalancedSampler ----------------------------------------------------------------------------------------------


def balanced(data: Sequences) -> ClassBalancedSampler:
    return ClassBalancedSampler(data.labels.numpy(), within=buckets(data))


def balanced_loader(samples: int, world: int) -> TricksDataLoader:
    data = Sequences(samples, seed=1)
    return loader_with(balanced(data), data, world)


def class_balanced_sampler() -> "Run":
    from tests.conformance.cases import Run

    return Run(Counting(36), loader=balanced_loader, samples=36)


def check_class_balanced_sampler(outcome: "Outcome") -> None:
    data, taken = Sequences(36, seed=1), torch.tensor(taken_in_each_epoch(outcome))
    expected = [np.bincount(balanced(data).draw(epoch), minlength=36).tolist() for epoch in range(EPOCHS)]
    assert taken.tolist() == expected, "an epoch is not what was drawn"
    counts = torch.stack([taken[:, data.labels == label].sum(1) for label in range(3)])
    assert (counts == data.labels.bincount().max()).all(), "classes do not come equally often"


# -- FeatureNormalizer -------------------------------------------------------------------------------------------------


class Normalized(Classifier):
    """With two features of each sequence, normalised; each rank fits on its own part, once, and not after a resume."""

    def __init__(self) -> None:
        super().__init__()
        self.normalizer = FeatureNormalizer(2)

    def on_validation_start(self) -> None:
        self.fit_once()  # the first is the sanity check

    def on_train_start(self) -> None:
        self.fit_once()

    def fit_once(self) -> None:
        if self.normalizer.fitted:
            return
        assert self.trainer.global_step == 0, "the checkpoint's statistics were not restored"
        data = Sequences(54, seed=1)
        own = range(self.trainer.global_rank, len(data), self.trainer.world_size)
        device = self.normalizer.statistics.device
        self.normalizer.fit(self.features(data[index][0][None].to(device)) for index in own)

    @staticmethod
    def features(tokens: Tensor) -> Tensor:
        """The length and the mean token of each sequence."""
        real = (tokens != 0).sum(1)
        return torch.stack([100.0 + real, tokens.sum(1) / real], dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        told = self.normalizer(self.features(tokens)).to(self.head.weight.dtype)
        return super().forward(tokens) + told.sum(1, keepdim=True) * self.head.bias


def feature_normalizer() -> "Run":
    from tests.conformance.cases import Run

    return Run(Normalized())


def check_feature_normalizer(outcome: "Outcome") -> None:
    data = Sequences(54, seed=1)
    rows = torch.cat([Normalized.features(tokens[None]) for tokens in data.tokens]).double()
    found = outcome["weights"]["normalizer.statistics"].view(torch.float64)
    assert torch.allclose(found[:2], torch.stack([rows.mean(0), rows.std(0, correction=0)]), rtol=1e-12)
    assert found[3].tolist() == [54, 54]


# -- SequenceLengthWarmup ----------------------------------------------------------------------------------------------


def as_dictionary(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tokens, labels = collate(samples)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}


def dictionary_loader(samples: int, world: int) -> TricksDataLoader:
    data = Sequences(samples, seed=1)
    return TricksDataLoader(data, batch_size=8 // world, shuffle=True, seed=0, collate_fn=as_dictionary)


class Shortened(Classifier):
    def training_step(self, batch: Any) -> Tensor:
        return super().training_step((batch["input_ids"], batch["labels"]))


def sequence_length_warmup() -> "Run":
    from tests.conformance.cases import Run

    warmup = SequenceLengthWarmup(3, 9, tokens=500, multiple=1)
    return Run(Shortened(), (warmup,), loader=dictionary_loader)


def observe_sequence_length_warmup(run: "Run", trainer: L.Trainer) -> dict[str, Any]:
    (warmup,) = run.callbacks
    return {"tokens_seen": warmup.tokens_seen}


def check_sequence_length_warmup(outcome: "Outcome") -> None:
    lengths = outcome["logged"]["sequence_length"]["values"].tolist()
    assert (lengths[0], lengths[-1]) == (3, 9)
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 4
    assert outcome["facts"]["tokens_seen"] >= 500
