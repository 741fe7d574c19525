"""Streaming Parquet files through the loader, against Hugging Face's iterable dataset with its shuffle buffer.

Run it by `python benchmarks/streaming.py`: about a minute. Times are CPU times on one thread, medians of alternating
runs; `--quick` takes a tenth of the rows.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import _report
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_tricks.data import (
    DynamicPaddingCollator,
    IterableSource,
    ParquetSource,
    StreamingSampler,
    TricksDataLoader,
    measure_lengths,
)

BATCH, BUDGET, RANKS, BUFFER, EPOCHS = 32, 8192, 8, 10_000, 3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "streaming.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    busy, rows = _report.load_average(), 10_000 if options.quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        found = {"reading": reading(write(Path(folder), rows))}
    found["order"] = order(lengths_of(10 * rows), shards=100)
    found["order_of_shards_that_differ"] = order(differing(10 * rows), shards=64)
    _report.write(
        options.output,
        "CPU time of streamed batches, and what the order wastes",
        found,
        load_average_before=busy,
        note="seconds of CPU time, one thread, no workers; log-normal lengths",
    )


def lengths_of(rows):
    return np.clip(np.random.default_rng(0).lognormal(4.0, 0.8, rows), 1, 2000).astype(np.int64)


def write(folder, rows):
    import pyarrow
    import pyarrow.parquet

    offsets = np.concatenate([[0], np.cumsum(lengths_of(rows))])
    tokens = pyarrow.array(np.random.default_rng(1).integers(1, 30_000, offsets[-1]).astype(np.int32))
    table = pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), tokens)})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2000)
    return folder / "rows.parquet"


def reading(path):
    import datasets

    datasets.disable_progress_bars()
    collate = DynamicPaddingCollator()

    def measured():
        return measure_lengths(ParquetSource(path), length="input_ids")

    def own(**options):
        source = ParquetSource(path)
        sampler = StreamingSampler(source, lengths, buffer=BUFFER, **options)
        return TricksDataLoader(source, sampler=sampler, collate_fn=collate)

    def other():
        stream = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        return DataLoader(stream.shuffle(seed=0, buffer_size=BUFFER), batch_size=BATCH, collate_fn=collate)

    start = time.process_time()
    lengths = measured()
    found = {"rows": len(lengths), "measuring_lengths": time.process_time() - start}
    kinds = {
        "hugging_face": other,
        "own_batch_32": lambda: own(batch_size=BATCH),
        "own_budget_8192": lambda: own(max_tokens=BUDGET),
    }
    spent = {name: [] for name in kinds}
    waste = {}
    for _ in range(3):
        for name, make in kinds.items():
            start, real, padded = time.process_time(), 0, 0
            for batch in make():
                real += int(batch["attention_mask"].sum())
                padded += batch["input_ids"].numel()
            spent[name].append(time.process_time() - start)
            waste[name] = 1 - real / padded
    for name, times in spent.items():
        found[name] = {"seconds": statistics.median(times), "waste": waste[name]}
    found["times_as_long"] = found["hugging_face"]["seconds"] / found["own_batch_32"]["seconds"]
    return found


def differing(rows):
    """Lengths of 64 shards, whose means are log-normal too: 30 to 1,000 tokens."""
    numbers = np.random.default_rng(2)
    means = np.repeat(numbers.normal(5.0, 0.8, 64), rows // 64)
    return np.clip(numbers.lognormal(means, 0.4), 1, 2000).astype(np.int64)


def order(lengths, shards):
    """Numbers alone, on several ranks, over three epochs: the epoch that waits most counts."""
    rows = len(lengths) // shards
    source = IterableSource([range(rows)] * shards, rows=[rows] * shards)
    found = {"rows": len(lengths), "shards": shards, "ranks": RANKS}
    for name, options in (("batch_32", {"batch_size": BATCH}), ("budget_8192", {"max_tokens": BUDGET})):
        sampler = StreamingSampler(source, lengths, buffer=BUFFER, **options)
        start, costs = time.process_time(), []
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            costs.append(costs_of(sampler.plan(RANKS, sampler.limit), lengths))
        found[name] = {
            "seconds_an_epoch_all_ranks": (time.process_time() - start) / EPOCHS,
            "waste": max(1 - lengths.sum() / each.sum() for each in costs),
            "useful_share": min(lengths.sum() / (RANKS * each.max(axis=1).sum()) for each in costs),
            "steps": [len(each) for each in costs],
        }
    return found


def costs_of(plan, lengths):
    """Padded tokens of each step and rank."""
    parts = ([plan.part(step, rank, RANKS) for rank in range(RANKS)] for step in range(len(plan)))
    return np.array([[len(part) * int(lengths[part].max()) for part in step] for step in parts])


if __name__ == "__main__":
    main()
