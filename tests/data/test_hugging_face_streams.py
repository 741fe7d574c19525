"""Hugging Face's iterable datasets behind the loader, and their fingerprints."""

import json
from itertools import chain

import datasets
import pytest

from lightning_tricks.data import IterableSource, StreamingSampler, TricksDataLoader
from lightning_tricks.errors import MisconfigurationError

COUNT = 90


@pytest.fixture
def stream(tmp_path):
    files = []
    for number in range(3):
        path = tmp_path / f"{number}.jsonl"
        lines = [json.dumps({"n": n, "words": "a " * n}) for n in range(30 * number, 30 * number + 30)]
        path.write_text("\n".join(lines))
        files.append(str(path))
    return lambda: datasets.load_dataset(
        "json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )


def loader(stream, workers=0):
    source = IterableSource(stream.map(lambda row: {"twice": 2 * row["n"]}))
    sampler = StreamingSampler(source, batch_size=4, buffer=8)
    return TricksDataLoader(source, sampler=sampler, num_workers=workers, collate_fn=list)


def numbers(batches):
    return [[row["n"] for row in batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_epoch_and_a_resumption(stream, workers):
    whole = loader(stream())
    assert whole.dataset.rows.tolist() == [30, 30, 30]
    assert whole.dataset[7]["twice"] == 14
    expected = numbers(whole)
    assert sorted(chain(*expected)) == list(range(COUNT))
    first = loader(stream(), workers)
    iterator = iter(first)
    found = numbers(next(iterator) for _ in range(9))
    second = loader(stream(), workers)
    second.load_state_dict(first.state_dict())
    assert found + numbers(second) == expected


def test_an_iterable_dataset_is_refused_where_a_map_is_needed(stream):
    with pytest.raises(MisconfigurationError, match=r"got IterableDataset\. .*IterableSource"):
        TricksDataLoader(stream(), batch_size=2, shuffle=False, seed=0)


def test_the_fingerprint_of_a_map_style_dataset():
    def loader(numbers):
        data = datasets.Dataset.from_dict({"n": numbers})
        return TricksDataLoader(data, batch_size=2, shuffle=True, seed=0)

    one = loader([1, 2, 3, 4, 5])
    next(iter(one))
    loader([1, 2, 3, 4, 5]).load_state_dict(one.state_dict())
    with pytest.raises(MisconfigurationError, match=r"middle of an epoch .* with fingerprint of the data="):
        loader([1, 2, 3, 4, 6]).load_state_dict(one.state_dict())
