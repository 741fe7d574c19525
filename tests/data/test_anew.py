"""`TricksDataLoader.anew`: the same epoch once more, which leaves the loader's own position alone."""

import itertools

from lightning_tricks.data import TricksDataLoader


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


def test_other_epochs_of_it_are_its_own():
    loader = TricksDataLoader(range(10), batch_size=2, shuffle=True, seed=3)
    other = loader.anew()
    other.set_epoch(7)
    assert loader.state_dict()["epoch"] == 0
