"""`TricksDataLoader.anew`: the same epoch once more, which leaves the loader's own position alone."""

import itertools

import pytest

from lightning_tricks.data import (
    ClassBalancedSampler,
    IterableSource,
    LengthBucketSampler,
    StreamingSampler,
    TricksDataLoader,
)


def test_the_same_epoch_from_its_first_batch():
    loader = TricksDataLoader(range(10), batch_size=2, shuffle=True, seed=3)
    loader.set_epoch(4)
    whole = [batch.tolist() for batch in loader]
    loader.set_epoch(4)
    iterator = iter(loader)
    first = [batch.tolist() for batch in itertools.islice(iterator, 2)]
    assert [batch.tolist() for batch in loader.anew()] == whole
    assert loader.state_dict()["batches"] == 2
    assert first + [batch.tolist() for batch in iterator] == whole


SOURCE = IterableSource([range(10)])
SAMPLERS = {
    "plain": {"batch_size": 2, "shuffle": True, "seed": 3},
    "buckets": {"sampler": LengthBucketSampler([*range(1, 11)], batch_size=2)},
    "balanced": {"sampler": ClassBalancedSampler([0] * 8 + [1] * 2, batch_size=2)},
    "balanced within": {
        "sampler": ClassBalancedSampler([0] * 8 + [1] * 2, within=LengthBucketSampler([*range(1, 11)], max_tokens=20))
    },
    "stream": {"sampler": StreamingSampler(SOURCE, batch_size=2)},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_epochs_of_it_are_its_own(name):
    loader = TricksDataLoader(SOURCE, **SAMPLERS[name])
    whole = [batch.tolist() for batch in loader]
    other = loader.anew()
    other.set_epoch(7)
    assert loader.state_dict()["epoch"] == 0
    assert [batch.tolist() for batch in loader] == whole != [batch.tolist() for batch in other]
