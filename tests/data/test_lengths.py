"""measure_lengths: by key or function, alone or in processes, kept in a file."""

import pytest
from torch.utils.data import IterableDataset

from lightning_tricks.data import measure_lengths
from lightning_tricks.errors import DataError, MisconfigurationError

SAMPLES = [{"text": "a" * (index % 7 + 1), "label": 0} for index in range(2500)]
EXPECTED = [index % 7 + 1 for index in range(2500)]


def double(sample):
    return 2 * len(sample["text"])


def test_by_key_and_by_function():
    assert measure_lengths(SAMPLES, length="text").tolist() == EXPECTED
    assert measure_lengths(SAMPLES, length=double).tolist() == [2 * length for length in EXPECTED]
    assert measure_lengths(["ab", "c"]).tolist() == [2, 1]


@pytest.mark.slow
def test_in_processes():
    assert measure_lengths(SAMPLES, length="text", num_workers=2).tolist() == EXPECTED


def test_cache(tmp_path):
    path = tmp_path / "new" / "lengths.npy"
    assert measure_lengths(SAMPLES, length="text", cache=path).tolist() == EXPECTED
    assert measure_lengths(SAMPLES, length="no such key", cache=path).tolist() == EXPECTED
    assert [file.name for file in path.parent.iterdir()] == ["lengths.npy"]
    with pytest.raises(DataError, match=r"has 2500 lengths, the dataset 1 samples. Delete it"):
        measure_lengths(SAMPLES[:1], length="text", cache=path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="is damaged"):
        measure_lengths(SAMPLES, length="text", cache=path)


def test_bad_input():
    with pytest.raises(DataError, match="length of sample 0 cannot be had by `length='tokens'`"):
        measure_lengths(SAMPLES, length="tokens")
    with pytest.raises(DataError, match="sample 0 cannot be had by `length='label'`"):
        measure_lengths([{"label": 3}], length="label")
    with pytest.raises(MisconfigurationError, match="got Stream"):
        measure_lengths(Stream())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())
