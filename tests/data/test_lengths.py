"""measure_lengths: by key or function, alone or in processes, kept in a file."""

import numpy as np
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


class Counted:
    """Samples that write down each time they are pickled."""

    sent = 0

    def __len__(self):
        return 6 * 1024

    def __getitem__(self, index):
        return [0] * (index % 7 + 1)

    def __getstate__(self):
        Counted.sent += 1
        return {}


@pytest.mark.slow
def test_in_processes_each_of_which_gets_the_dataset_once(monkeypatch):
    monkeypatch.setattr(Counted, "sent", 0)
    assert measure_lengths(Counted(), num_workers=2).tolist() == [index % 7 + 1 for index in range(len(Counted()))]
    assert 1 <= Counted.sent <= 2  # six tasks


def test_cache(tmp_path):
    path = tmp_path / "new" / "lengths.npy"
    assert measure_lengths(SAMPLES, length="text", cache=path).tolist() == EXPECTED
    assert measure_lengths(SAMPLES, length="text", cache=path).tolist() == EXPECTED
    assert np.load(path).tolist() == EXPECTED
    assert [file.name for file in path.parent.iterdir()] == ["lengths.npy"]
    with pytest.raises(DataError, match=r"has 2500 lengths, the dataset 1 samples. Delete it"):
        measure_lengths(SAMPLES[:1], length="text", cache=path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="is damaged"):
        measure_lengths(SAMPLES, length="text", cache=path)


class Known(list):
    """Samples with a fingerprint."""

    def fingerprint(self):
        return f"{sum(map(len, self))} letters"


def test_a_cache_of_other_data_is_refused(tmp_path):
    path = tmp_path / "lengths.npy"
    measure_lengths(SAMPLES, length="text", cache=path)
    with pytest.raises(DataError, match="measured with length=text, but now length=no such key"):
        measure_lengths(SAMPLES, length="no such key", cache=path)
    other = [*SAMPLES[:-1], {"text": "longer than before"}]
    with pytest.raises(DataError, match="says that sample 2499 has length 1, but it has 18: the lengths are those of"):
        measure_lengths(other, length="text", cache=path)
    known, longer = Known(["a"] * 100), Known(["a"] * 100)
    longer[2] = "ab"  # where nobody probes
    measure_lengths(known, cache=tmp_path / "known.npy")
    with pytest.raises(DataError, match="measured with fingerprint=100 letters, but now fingerprint=101 letters"):
        measure_lengths(longer, cache=tmp_path / "known.npy")


def test_a_cache_of_lengths_alone_is_probed(tmp_path):
    np.save(tmp_path / "old.npy", np.array(EXPECTED))
    assert measure_lengths(SAMPLES, length="text", cache=tmp_path / "old.npy").tolist() == EXPECTED
    with pytest.raises(DataError, match="says that sample 0 has length 1, but it has 2"):
        measure_lengths(SAMPLES, length=double, cache=tmp_path / "old.npy")


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
