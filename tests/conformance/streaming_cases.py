"""The row of StreamingSampler: batches within a budget, from shards of which each rank reads its own."""

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_tricks.data import IterableSource, StreamingSampler, TricksDataLoader
from tests.conformance.data_cases import BUDGET, EPOCHS, Counting, Together, taken_in_each_epoch
from tests.conformance.model import Sequences, collate

if TYPE_CHECKING:
    from tests.conformance.cases import Outcome, Run

SHARD = 8  # rows


def streaming_loader(samples: int, world: int) -> TricksDataLoader:
    data = Sequences(samples, seed=1)
    rows = [data[index] for index in range(samples)]
    source = IterableSource([rows[first : first + SHARD] for first in range(0, samples, SHARD)])
    lengths = np.array([len(tokens) for tokens, _ in rows])
    sampler: Any = StreamingSampler(source, lengths, max_tokens=BUDGET, window=2, buffer=6)
    return TricksDataLoader(source, sampler=sampler if world == 2 else Together(sampler), collate_fn=collate)


def streaming_sampler() -> "Run":
    from tests.conformance.cases import Run

    return Run(Counting(), loader=streaming_loader)


def check_streaming_sampler(outcome: "Outcome") -> None:
    assert taken_in_each_epoch(outcome) == [[1] * 54] * EPOCHS, "an epoch is not every row once"
