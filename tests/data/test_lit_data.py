"""Folders that litdata wrote, behind the loader."""

import importlib.util
import json
import sys
from itertools import chain

import numpy as np
import pytest

from lightning_tricks.data import LitDataSource, StreamingSampler, TricksDataLoader
from lightning_tricks.errors import DataError, MisconfigurationError, MissingDependencyError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
HAS_LITDATA = importlib.util.find_spec("litdata") is not None
# Its boto3 asks for an older python-dateutil than constraints.txt pins.
needs_litdata = pytest.mark.skipif(not HAS_LITDATA, reason="not run: needs litdata (pip install litdata)")
COUNT = 57


@pytest.fixture
def folder(tmp_path):
    from litdata.streaming.cache import Cache

    path = tmp_path / "data"
    path.mkdir()
    cache = Cache(str(path), chunk_size=10)
    for n in range(COUNT):
        cache[n] = {"n": n, "values": np.arange(n % 5 + 1)}
    cache.done()
    cache.merge()
    return path


def loader(folder, workers=0):
    source = LitDataSource(folder)
    sampler = StreamingSampler(source, batch_size=4, buffer=8)
    return TricksDataLoader(source, sampler=sampler, num_workers=workers, collate_fn=list)


def numbers(batches):
    return [[row["n"] for row in batch] for batch in batches]


@needs_litdata
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_epoch_and_a_resumption(folder, workers):
    whole = loader(folder)
    assert whole.dataset.rows.tolist() == [10] * 5 + [7]
    assert whole.dataset[13]["values"].tolist() == [0, 1, 2, 3]
    expected = numbers(whole)
    assert sorted(chain(*expected)) == list(range(COUNT))
    first = loader(folder, workers)
    iterator = iter(first)
    found = numbers(next(iterator) for _ in range(6))
    second = loader(folder, workers)
    second.load_state_dict(first.state_dict())
    assert found + numbers(second) == expected


@needs_litdata
def test_other_and_damaged_folders(folder):
    one = loader(folder)
    next(iter(one))
    state = one.state_dict()
    chunk = sorted(folder.glob("*.bin"))[2]
    content = chunk.read_bytes()
    for rest, what in ((content[:-9], "has .* bytes"), (b"", "is missing or empty")):
        chunk.write_bytes(rest)
        with pytest.raises(DataError, match=rf"The chunk `.*{chunk.name}` {what}"):
            LitDataSource(folder)
    chunk.write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    index["chunks"][2]["chunk_bytes"] -= 1
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(MisconfigurationError, match="with fingerprint of the data="):
        loader(folder).load_state_dict(state)
    index["config"]["item_loader"] = "TokensLoader"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(MisconfigurationError, match="written for litdata's TokensLoader"):
        LitDataSource(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"has no whole index.json .*litdata.optimize"):
        LitDataSource(folder)


def test_without_litdata(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(MissingDependencyError, match=r"Run: pip install litdata$"):
        LitDataSource(tmp_path)
