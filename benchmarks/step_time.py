"""What a step costs under each preset, beside Lightning's own strategy of its kind, on two CPU processes.

Run it by `python benchmarks/step_time.py`: under three minutes. The two of a pair take turns, block by block, in the
same processes with the same process group (plain DDP in two groups, since an import cannot be undone). What counts is
CPU time of whole steps, summed over the ranks: other work on the machine hardly disturbs it.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import _report

sys.path.insert(0, str(_report.FOLDER.parent))

from tests.conformance.engines import Group

# preset -> Lightning's own, and the ratio that the preset may cost at most
PAIRS = {
    "imported": ("bare", 1.00),  # DDP with and without `import lightning_tricks`
    "fsdp2": ("ModelParallelStrategy", 1.02),
    "zero_1": ("DeepSpeedStrategy, stage 1", 1.02),
    "zero_2": ("DeepSpeedStrategy, stage 2", 1.02),
    "zero_3": ("DeepSpeedStrategy, stage 3", 1.02),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "step_time.json")
    options = parser.parse_args()
    start, busy = time.perf_counter(), _report.load_average()
    with tempfile.TemporaryDirectory() as folder:
        groups = {
            "bare": Group(2, Path(folder, "bare"), "benchmarks._step_jobs:prepare"),
            "with package": Group(2, Path(folder, "package"), "benchmarks._step_jobs:prepare_with_package"),
        }
        try:
            pairs = {name: compare(groups, name, *PAIRS[name], options.blocks) for name in options.pairs}
        finally:
            for group in groups.values():
                group.close()
    _report.write(
        options.output,
        "CPU time of a step, over that of Lightning's own strategy of the same kind",
        {
            name: {key: pair[key] for key in ("ratio", "interval_95", "bound", "verdict")}
            for name, pair in pairs.items()
        },
        load_average_before=busy,
        seconds=round(time.perf_counter() - start),
        ranks=2,
        threads_per_rank=1,
        blocks=options.blocks,
        pairs=pairs,
    )


def compare(groups, ours, theirs, bound, blocks):
    """Alternate blocks of steps, each side first in turn. The first block of each warms up.

    Where the sides are different processes, fresh ones start three times: two processes are never quite alike.
    """
    found = {ours: [], theirs: []}
    rounds = 3 if theirs == "bare" else 1
    for _ in range(rounds):
        if rounds > 1:
            for group in groups.values():
                group.close()
        for block in range(-(-blocks // rounds) + 1):
            for side in (ours, theirs) if block % 2 else (theirs, ours):
                group = groups["bare" if side == "bare" else "with package"]
                ranks = group.call("benchmarks._step_jobs:steps", strategy=side)
                if block:
                    found[side].append(sum(map(undisturbed, ranks)))
    ratios = [one / two for one, two in zip(found[ours], found[theirs], strict=True)]
    low, high = interval(ratios)
    ratio = statistics.median(ratios)
    print(f"{ours} / {theirs}: {ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": round(ratio, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "bound": bound,
        "verdict": verdict(low, high, bound),
        "milliseconds": {name: round(1e3 * statistics.median(each), 2) for name, each in found.items()},
        "each_ratio": [round(value, 4) for value in ratios],
    }


def undisturbed(steps):
    """The mean of the quickest third: what others take of caches and memory only ever adds."""
    return statistics.mean(sorted(steps)[: max(1, len(steps) // 3)])


def interval(values):
    """Where the median lies with 95% confidence, by resampling."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def verdict(low, high, bound):
    if high <= bound:
        return "holds"
    return "exceeded" if low > bound else "holds within the noise" if (low + high) / 2 <= bound else "undecided"


if __name__ == "__main__":
    main()
