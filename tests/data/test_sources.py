"""Sources of data larger than memory: Parquet files and iterables, whole and damaged."""

import gzip
import os
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from lightning_tricks.data import (
    DynamicPaddingCollator,
    IterableSource,
    ParquetSource,
    ShardedSource,
    StreamingSampler,
    TricksDataLoader,
    measure_lengths,
)
from lightning_tricks.data.iterables import BLOCK
from lightning_tricks.errors import DataError, DegradedWarning, MisconfigurationError

ROWS = 230


def rows(first, count):
    return [
        {"input_ids": [n] * (1 + n % 7), "label": n % 3, "text": "x" * (n % 5)} for n in range(first, first + count)
    ]


def write(folder, counts=(100, 60, 70), group=20):
    paths, first = [], 0
    for number, count in enumerate(counts):
        paths.append(Path(folder, f"part-{number}.parquet"))
        table = pyarrow.Table.from_pylist(rows(first, count))
        pyarrow.parquet.write_table(table, paths[-1], row_group_size=group, write_page_checksum=True)
        first += count
    return paths


def first_tokens(loader):
    return [batch["input_ids"][:, 0].tolist() for batch in loader]


def streamed(source, workers=0, **options):
    sampler = StreamingSampler(source, **{"batch_size": 8, "window": 3, "buffer": 20, **options})
    return TricksDataLoader(source, sampler=sampler, num_workers=workers, collate_fn=DynamicPaddingCollator())


# -- Parquet -----------------------------------------------------------------------------------------------------------


def test_rows_are_what_was_written(tmp_path):
    write(tmp_path)
    source = ParquetSource(tmp_path)
    assert source.rows.tolist() == [20] * 8 + [20] * 3 + [10]
    assert len(source) == ROWS
    for index in (0, 19, 20, 229, 5):
        found = source[index]
        assert {**found, "input_ids": found["input_ids"].tolist()} == rows(index, 1)[0]
        assert found["input_ids"].flags.writeable
    with pytest.raises(IndexError):
        source[ROWS]
    few = ParquetSource(tmp_path / "part-1.parquet", columns=["label"], transform=lambda row: row["label"] + 10)
    assert [few[index] for index in range(4)] == [n % 3 + 10 for n in range(100, 104)]


def test_values_that_are_no_lists_of_numbers(tmp_path):
    rare = [{"a": None, "b": [1, None], "c": {"d": 1}, "e": [[1], [2, 3]], "f": ["x"]}, {"a": 2, "b": None, "e": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rare), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path)
    assert source[0] == rare[0]
    assert source[1]["b"] is None


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_epoch_of_files_and_a_resumption(tmp_path, workers):
    write(tmp_path)
    whole = streamed(ParquetSource(tmp_path))
    whole.set_epoch(1)
    expected = first_tokens(whole)
    assert sorted(chain(*expected)) == list(range(ROWS))
    first = streamed(ParquetSource(tmp_path), workers)
    first.set_epoch(1)
    iterator = iter(first)
    found = [next(iterator)["input_ids"][:, 0].tolist() for _ in range(11)]
    second = streamed(ParquetSource(tmp_path), workers)
    second.load_state_dict(first.state_dict())
    assert found + first_tokens(second) == expected


def test_lengths_are_measured_in_one_column_alone(tmp_path):
    write(tmp_path)
    expected = [len(row["input_ids"]) for row in rows(0, ROWS)]
    source = ParquetSource(tmp_path)
    assert measure_lengths(source, length="input_ids").tolist() == expected
    assert not source._held.rows
    assert measure_lengths(source, length="text").tolist() == [len(row["text"]) for row in rows(0, ROWS)]
    assert measure_lengths(source, length=lambda row: len(row["input_ids"])).tolist() == expected
    loader = streamed(source, lengths=measure_lengths(source, length="input_ids"), batch_size=None, max_tokens=40)
    assert max(batch["input_ids"].numel() for batch in loader) <= 40


def damage(path, group):
    """Flip the bytes of a row group's pages."""
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(group).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    for at in range(start + column.total_compressed_size // 2, start + column.total_compressed_size):
        content[at] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_row_group_is_named_and_left_out_only_on_request(tmp_path):
    path = write(tmp_path)[1]
    damage(path, 2)
    with pytest.raises(DataError, match=r"Row group 2 of `.*part-1.parquet` is damaged: .*corrupted='skip'"):
        first_tokens(streamed(ParquetSource(tmp_path)))
    with pytest.warns(DegradedWarning, match=r"Left out of the data: Row group 2 of `.*part-1.parquet`"):
        source = ParquetSource(tmp_path, corrupted="skip")
    expected = set(range(ROWS)) - set(range(140, 160))
    assert sorted(chain(*first_tokens(streamed(source)))) == sorted(expected)


def test_a_damaged_file_is_named_and_left_out_only_on_request(tmp_path):
    path = write(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"`.*part-0.parquet` is not a whole Parquet file"):
        ParquetSource(tmp_path)
    with pytest.warns(DegradedWarning, match="part-0.parquet"):
        source = ParquetSource(tmp_path, corrupted="skip")
    assert len(source) == 130


def test_files_that_cannot_be_meant(tmp_path):
    with pytest.raises(DataError, match=r"There is no `\*.parquet` in"):
        ParquetSource(tmp_path)
    with pytest.raises(DataError, match=r"There is no file `.*none.parquet`"):
        ParquetSource([tmp_path / "none.parquet"])
    path = write(tmp_path)[0]
    for corrupted in ("error", "skip"):
        with pytest.raises(DataError, match=r"part-0.parquet` has no column `words`. Its columns are input_ids, label"):
            ParquetSource(path, columns=["words"], corrupted=corrupted)
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "part-9.parquet")
    with pytest.raises(DataError, match=r"part-9.parquet` has no column `input_ids`"):
        ParquetSource(tmp_path)
    with pytest.raises(MisconfigurationError, match="`corrupted` must be 'error' or 'skip', got 'ignore'"):
        ParquetSource(path, corrupted="ignore")


def test_other_files_are_refused_in_mid_epoch(tmp_path):
    paths = write(tmp_path)
    one = streamed(ParquetSource(tmp_path))
    next(iter(one))
    state = one.state_dict()
    streamed(ParquetSource(tmp_path)).load_state_dict(state)
    other = pyarrow.Table.from_pylist([{**row, "label": 5, "text": "longer"} for row in rows(100, 60)])
    pyarrow.parquet.write_table(other, paths[1], row_group_size=20)
    with pytest.raises(MisconfigurationError, match=r"middle of an epoch .* with fingerprint of the data="):
        streamed(ParquetSource(tmp_path)).load_state_dict(state)


def test_a_source_is_sent_to_another_process_without_what_it_holds(tmp_path):
    write(tmp_path)
    source = ParquetSource(tmp_path)
    source.keep(100)
    source[3]
    other = pickle.loads(pickle.dumps(source))
    assert not other._held.rows
    assert other[3]["label"] == 0
    assert other.fingerprint() == source.fingerprint()


@pytest.mark.slow
def test_data_larger_than_the_memory_allowed(tmp_path):
    """160 MB of rows in a process that may have 100 MB more; to hold all of them fails there."""
    group = np.arange(16 * 2**20 // 8)
    path = tmp_path / "large.parquet"
    schema = pyarrow.schema([("values", pyarrow.list_(pyarrow.int64())), ("n", pyarrow.int64())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for number in range(10):
            values = pyarrow.ListArray.from_arrays(np.arange(0, len(group) + 1, 1024), group + number)
            table = pyarrow.table([values, np.arange(number * 2048, (number + 1) * 2048)], schema=schema)
            writer.write_table(table, row_group_size=256)
    del group, values, table
    assert path.stat().st_size > 160 * 10**6
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    found = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.split() == ["streamed", "refused"], found.stdout + found.stderr


def within_limit(path):
    import resource

    source = ParquetSource(path)
    torch.zeros(1) + 1
    used = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")
    )
    resource.setrlimit(resource.RLIMIT_DATA, ((used + 100 * 1024) * 1024,) * 2)
    lengths = measure_lengths(source, length="values")
    sampler = StreamingSampler(source, lengths, max_tokens=8 * 1024, window=10, buffer=500)
    loader = TricksDataLoader(source, sampler=sampler, collate_fn=DynamicPaddingCollator())
    seen = list(chain(*(batch["n"].tolist() for batch in loader)))
    assert sorted(seen) == list(range(10 * 2048))
    sys.stdout.write("streamed ")
    try:
        held = [source.read(shard, 0) for shard in range(len(source.rows))]
        sys.stdout.write(f"held {len(held)}")
    except MemoryError:
        sys.stdout.write("refused")


# -- iterables ---------------------------------------------------------------------------------------------------------


def test_iterables_are_read_once_and_in_turn(tmp_path):
    class Counted:
        def __init__(self):
            self.times = 0

        def __iter__(self):
            self.times += 1
            return iter({"input_ids": [n]} for n in range(3 * BLOCK + 7))

    shard = Counted()
    source = IterableSource([shard])
    assert source.rows.tolist() == [3 * BLOCK + 7]
    source.keep(BLOCK)
    assert [source[n]["input_ids"] for n in range(len(source))] == [[n] for n in range(len(source))]
    assert shard.times == 2
    assert source[5]["input_ids"] == [5]
    assert shard.times == 3


def test_shards_in_turn_are_opened_once_an_epoch():
    """At the end of one and the beginning of the next a buffer jumps to and fro between them."""
    count = 8 * BLOCK + 1  # the last row may come long after the next shard's first ones

    class Counted:
        def __init__(self, first):
            self.first, self.times = first, 0

        def __iter__(self):
            self.times += 1
            return iter(range(self.first, self.first + count))

    shards = [Counted(count * number) for number in range(4)]
    source = IterableSource(shards)
    loader = TricksDataLoader(source, sampler=StreamingSampler(source, batch_size=50, buffer=3 * BLOCK))
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen = list(chain(*(batch.tolist() for batch in loader)))
        assert sorted(seen) == list(range(4 * count))
    assert [shard.times for shard in shards] == [3] * 4  # counted, and twice read
    assert not source._cursors


def test_a_fingerprint_does_not_go_by_addresses():
    class Row:
        pass

    assert IterableSource([[Row()]]).fingerprint() == IterableSource([[Row()]]).fingerprint()


def test_iterables_that_cannot_be_meant():
    with pytest.raises(MisconfigurationError, match="Shard 1 is a list_iterator, which cannot be read again"):
        IterableSource([[1], iter([2])])
    with pytest.raises(MisconfigurationError, match=r"make a list: IterableSource\(\[iterable\]\)"):
        IterableSource(x for x in (1, 2))
    with pytest.raises(DataError, match="Shard 1 is empty"):
        IterableSource([[1], []])
    with pytest.raises(MisconfigurationError, match="`rows` has 2 entries for 1 shards"):
        IterableSource([[1]], rows=[1, 1])

    class Broken:
        def __iter__(self):
            yield 1
            raise OSError("no such block")

    with pytest.raises(DataError, match="Shard 1 cannot be read: no such block"):
        IterableSource([[1], Broken()])


class Compressed:
    """A file of lines."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        with gzip.open(self.path, "rt") as lines:
            yield from (line.rstrip() for line in lines)


def compressed(folder, cut=None):
    """Three shards of 1,500 lines; of the second, `cut` bytes are left, or bytes in the middle are others."""
    paths = [folder / f"{number}.gz" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(gzip.compress("".join(f"{number} {line * 7919 % 1500}\n" for line in range(1500)).encode()))
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 2 :] = b"" if cut else bytes(255 - value for value in content[len(content) // 2 :])
    paths[1].write_bytes(content)
    return [Compressed(path) for path in paths]


@pytest.mark.parametrize(("cut", "why"), [(True, "Compressed file ended"), (False, "decompressing|Not a gzip|CRC")])
@pytest.mark.parametrize("rows", [None, [1500] * 3])
def test_a_damaged_shard_is_named_and_left_out_only_on_request(tmp_path, cut, why, rows):
    shards = compressed(tmp_path, cut)
    with pytest.raises(DataError, match=rf"Shard 1 cannot be read: .*({why}).*`corrupted='skip'`"):
        list(TricksDataLoader(IterableSource(shards, rows=rows), batch_size=100, shuffle=False, seed=0))
    with pytest.warns(DegradedWarning, match=r"Left out of the data: Shard 1 cannot be read"):
        source = IterableSource(shards, rows=rows, corrupted="skip")
    assert [source[row].split()[0] for row in (0, 1499, 1500, 2999)] == ["0", "0", "2", "2"]
    assert len(source) == 3000
    with gzip.open(tmp_path / "2.gz", "wt") as file:
        file.write("2 0\n")
    anew = pickle.loads(pickle.dumps(source))  # without what it holds
    with pytest.raises(DataError, match="Shard 2 has fewer than the 1500 rows"):
        anew[2500]
    with pytest.raises(MisconfigurationError, match="`corrupted` must be 'error' or 'skip', got 'ignore'"):
        IterableSource(shards, corrupted="ignore")


def test_an_empty_shard_is_none_that_is_damaged():
    with pytest.raises(DataError, match="Shard 1 is empty"):
        IterableSource([[1], []], corrupted="skip")


@pytest.mark.parametrize(("change", "word"), [([1, 2], "fewer"), ([1, 2, 3, 4], "more")])
def test_a_shard_of_another_size_is_named(change, word):
    shard = [1, 2, 3]
    source = IterableSource([[0], shard])
    shard[:] = change
    with pytest.raises(DataError, match=f"Shard 1 has {word} than the 3 rows that were counted"):
        source[1]


def test_other_iterables_are_refused_in_mid_epoch():
    def loader(shift):
        source = IterableSource([range(shift, shift + 10), range(20)])
        return TricksDataLoader(source, sampler=StreamingSampler(source, batch_size=4))

    one = loader(0)
    next(iter(one))
    loader(0).load_state_dict(one.state_dict())
    with pytest.raises(MisconfigurationError, match="with fingerprint of the data="):
        loader(1).load_state_dict(one.state_dict())


def test_a_source_of_one_s_own_needs_rows():
    class Own(ShardedSource):
        def read(self, shard, row):
            raise AssertionError("read")

        def fingerprint(self):
            return ""

    for sizes in ([], [3, 0]):
        with pytest.raises(DataError, match="shards of at least one row"):
            Own(sizes)


if __name__ == "__main__":
    within_limit(sys.argv[1])
