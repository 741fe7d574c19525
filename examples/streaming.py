"""Stream Parquet files in batches of a token budget, report on them, and go on from the middle of an epoch.

Run it by `python examples/streaming.py corpus/*.parquet --column input_ids`. Without files it makes up some in
`runs/streaming`.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from lightning_tricks.data import (
    DynamicPaddingCollator,
    ParquetSource,
    StreamingSampler,
    TricksDataLoader,
    measure_lengths,
    report,
)


def main() -> None:
    """Report on an epoch, and compare the rest of a resumed one with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--column", default="input_ids")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    files = options.files or make_up(Path("runs/streaming"), options.column)

    def loader() -> TricksDataLoader:
        source = ParquetSource(files, columns=[options.column])
        lengths = measure_lengths(source, length=options.column)
        sampler = StreamingSampler(source, lengths, max_tokens=options.max_tokens)
        collate = DynamicPaddingCollator()
        return TricksDataLoader(source, sampler=sampler, num_workers=options.workers, collate_fn=collate)

    print(report(loader(), ranks=options.ranks))
    first = loader()
    half = list(itertools.islice(first, len(first) // 2))
    second = loader()
    second.load_state_dict(first.state_dict())
    rest, whole = list(second), list(loader())
    same = all(a[options.column].equal(b[options.column]) for a, b in zip([*half, *rest], whole, strict=True))
    print(f"\nresumed after {len(half)} of {len(whole)} batches: {'the same batches' if same else 'OTHER BATCHES'}")


def make_up(folder: Path, column: str) -> list[Path]:
    """Write three files of sequences of log-normal lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    paths = [folder / f"{number}.parquet" for number in range(3)]
    for path in paths:
        lengths = np.clip(draw.lognormal(4, 0.8, 4000), 1, 1000).astype(int)
        rows = [draw.integers(1, 30_000, length).astype(np.int32) for length in lengths]
        pyarrow.parquet.write_table(pyarrow.table({column: rows}), path, row_group_size=500)
    return paths


if __name__ == "__main__":
    main()
