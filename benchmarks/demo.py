"""The demo's comparison with three seeds: does LoRA beat the head alone, do class weights help the rarest class?

Run it on a machine that does nothing else: `make bench`, or `python benchmarks/demo.py --seeds 0 1 2`. Each seed
changes the split, the order and the first weights; within a seed every row has the same of each, and the same budget.
`--rows 4 5` runs these alone, by their numbers, and keeps the rest of the file.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import _report
from lightning.pytorch import Callback

from lightning_tricks.cli.comparison import FULL, ROWS, Result, train

RESULTS = _report.RESULTS / "demo.json"
REPORTED = ("accuracy", "macro_f1", "recall_fresh", "recall_plot", "recall_rotten")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, nargs="+", choices=range(1, len(ROWS) + 1))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    before = json.loads(options.output.read_text()) if options.rows else {"rows": {}, "seeds": options.seeds}
    if before["seeds"] != options.seeds:
        parser.error(f"the rows that are kept have the seeds {before['seeds']}")
    chosen = [row for number, row in enumerate(ROWS, 1) if options.rows is None or number in options.rows]
    runs = {row.name: [] for row in chosen}
    start = time.perf_counter()
    for seed in options.seeds:
        for result in one_seed(seed, chosen):
            runs[result.name].append(result)
    found = {**before["rows"], **{name: summary(results) for name, results in runs.items()}}
    rows = {row.name: found[row.name] for row in ROWS if row.name in found}
    _report.write(
        options.output,
        "the demo's rows on the same split and budget; mean, least and most over the seeds",
        findings(rows) if len(rows) == len(ROWS) else before.get("findings", {}),
        seeds=options.seeds,
        budget=asdict(FULL),
        seconds=round(time.perf_counter() - start),
        run=list(runs),
        rows=rows,
    )


def one_seed(seed, rows):
    data = {by_tokens: FULL.data(seed, by_tokens=by_tokens) for by_tokens in (False, True)}
    data[False].prepare_data()
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            own = Path(folder, str(ROWS.index(row)))
            result = train(row, FULL, data[row.by_tokens], seed=seed, folder=own, watch=Callback())
            print(
                f"seed {seed}: {row.name}: macro-F1 {result.metrics['macro_f1']:.3f}, {result.seconds:.0f} s,"
                f" {result.texts_per_second:.0f} texts a second",
                flush=True,
            )
            yield result


def summary(results: list[Result]):
    values = {name: [result.metrics[name] for result in results] for name in REPORTED}
    values["seconds"] = [result.seconds for result in results]
    values["texts"] = [result.texts for result in results]
    values["texts_per_second"] = [result.texts_per_second for result in results]
    values["texts_per_cpu_second"] = [result.texts / result.cpu_seconds for result in results]
    values["steps"] = [result.steps for result in results]
    return {
        "learning_rate": results[0].learning_rate,
        "trainable": results[0].trainable,
        "checkpoint_bytes": results[0].checkpoint_bytes,
        **{name: spread(each) for name, each in values.items()},
    }


def spread(values):
    rounded = [round(value, 4) for value in values]
    return {"mean": round(statistics.mean(values), 4), "least": min(rounded), "most": max(rounded), "each": rounded}


def findings(rows):
    """The questions, answered from the figures alone."""
    head, lora, weighted, tricks, budget = (rows[row.name] for row in ROWS)
    gain = mean(lora, "macro_f1") - mean(head, "macro_f1")
    widest = max(width(head, "macro_f1"), width(lora, "macro_f1"))
    rarest = [w - u for w, u in zip(weighted["recall_plot"]["each"], lora["recall_plot"]["each"], strict=True)]
    return {
        "lora_minus_head_macro_f1": round(gain, 4),
        "widest_spread_of_macro_f1": round(widest, 4),
        "lora_beats_head_by_more_than_the_spread": gain > widest,
        "class_weights_change_of_rarest_recall": [round(value, 4) for value in rarest],
        "class_weights_raise_rarest_recall_on_average": statistics.mean(rarest) > 0,
        "class_weights_change_of_macro_f1": round(mean(weighted, "macro_f1") - mean(lora, "macro_f1"), 4),
        "tricks_change_of_macro_f1": round(mean(tricks, "macro_f1") - mean(weighted, "macro_f1"), 4),
        "token_budget_change_of_macro_f1": round(mean(budget, "macro_f1") - mean(tricks, "macro_f1"), 4),
        "token_budget_times_the_texts_per_cpu_second": times(budget, tricks, "texts_per_cpu_second"),
    }


def mean(row, name):
    return row[name]["mean"]


def width(row, name):
    return row[name]["most"] - row[name]["least"]


def times(row, other, name):
    return round(mean(row, name) / mean(other, name), 2) if name in other else None


if __name__ == "__main__":
    main()
