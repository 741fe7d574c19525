"""Batching, packing, balancing and normalising, each against the usual way, one after the other in one process.

Run it by `python benchmarks/data.py`: some minutes. Times are CPU times on one thread, medians where runs
alternate; `--quick` takes a tenth of the samples and says nothing about the goals.
"""

import argparse
import bisect
import json
import statistics
import time
import tracemalloc
import warnings
from pathlib import Path

import _report
import numpy as np
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_tricks.data import (
    ClassBalancedSampler,
    DataReport,
    FeatureNormalizer,
    LengthBucketSampler,
    TricksDataLoader,
    report,
)
from lightning_tricks.data._plan import RankBatches
from lightning_tricks.functional.packing import pack_best_fit
from lightning_tricks.recipes import TextClassificationData, TextClassifier

BATCH, BUDGET, RANKS = 32, 4096, 8


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batches", type=int, default=8, help="of each kind that are trained with")
    parser.add_argument("--parts", nargs="*", help="measure these alone, and keep the rest of the file")
    parser.add_argument("--output", type=Path, default=_report.RESULTS / "data.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start, busy = time.perf_counter(), _report.load_average()
    size = 1_000_000 if options.quick else 10_000_000
    parts = {
        "corpus": corpus,
        "ordering": lambda: ordering(size),
        "packing": lambda: packing(size // 10, size),
        "balancing": lambda: balancing(size),
        "normalizing": lambda: normalizing(size),
        "loader": overhead,
        "training": lambda: training(options.batches),
    }
    found = json.loads(options.output.read_text())["findings"] if options.parts else {}
    for name in options.parts or parts:
        found[name] = parts[name]()
        _report.write(
            options.output,
            "Time, waste and useful work of the data tricks against the usual way",
            found,
            load_average_before=busy,
            seconds=round(time.perf_counter() - start),
            note="seconds of CPU time, one thread; the lengths for ordering and packing are log-normal",
        )


def against(own, other, rounds=3):
    """Median CPU seconds of both, by turns, and how many times as long the other takes."""
    spent = {"own": [], "other": []}
    for _ in range(rounds):
        for name, run in (("own", own), ("other", other)):
            begin = time.process_time()
            run()
            spent[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    return {
        "own_seconds": round(medians["own"], 3),
        "other_seconds": round(medians["other"], 3),
        "times": round(medians["other"] / medians["own"], 2),
    }


def lengths_of(count):
    drawn = np.random.default_rng(0).lognormal(3.5, 0.8, count)
    return np.clip(drawn, 1, 512).astype(np.int32)


def ordering(count):
    """One epoch's order, against transformers' LengthGroupedSampler, which is timed once."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = lengths_of(count)
    listed = lengths.tolist()
    begin = time.process_time()
    get_length_grouped_indices(listed, BATCH)
    other = time.process_time() - begin
    del listed
    found = {"samples": count, "transformers_seconds": round(other, 3)}
    for name, options in (("batch 32", {"batch_size": BATCH}), ("token budget", {"max_tokens": BUDGET})):
        sampler = LengthBucketSampler(lengths, **options)
        sampler.steps(1, sampler.limit)
        spent = []
        for _ in range(3):
            begin = time.process_time()
            sampler.plan(1, sampler.limit)
            spent.append(time.process_time() - begin)
        tracemalloc.start()
        sampler.plan(1, sampler.limit)
        peak = round(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
        own = statistics.median(spent)
        found[name] = {"seconds": round(own, 3), "times": round(other / own, 1), "peak_MB_over_the_lengths": peak}
    return {**found, "goal": "15 times, 0.5 s, 200 MB"}


def review_data():
    data = TextClassificationData("reviews", max_length=512)
    data.prepare_data()
    data.setup("fit")
    return data, data.train_dataloader()


def corpus():
    """Waste on the review corpus, and the useful share of eight ranks."""
    _, loader = review_data()
    lengths = np.array([len(sample["input_ids"]) for sample in loader.dataset])
    samplers = {
        "batch 32": LengthBucketSampler(lengths, batch_size=BATCH),
        "token budget": LengthBucketSampler(lengths, max_tokens=BUDGET),
    }
    found = {"random": [report(loader, lengths=lengths, ranks=ranks) for ranks in (1, RANKS)]}
    for name, sampler in samplers.items():
        made = TricksDataLoader(loader.dataset, sampler=sampler)
        found[name] = [report(made, ranks=ranks) for ranks in (1, RANKS)]
    found["transformers"] = [grouped(lengths, ranks) for ranks in (1, RANKS)]
    shares = {
        name: {"waste": round(one.waste, 4), "useful_share_of_8": round(float(np.mean(eight.useful_share)), 4)}
        for name, (one, eight) in found.items()
    }
    return {"texts": len(lengths), **shares, "goal": "waste .09 and .02, useful share .95"}


def grouped(lengths, ranks):
    """The batches of transformers' sampler: ranks take every so manieth sample of one order."""
    from transformers.trainer_pt_utils import get_length_grouped_indices

    torch.manual_seed(0)
    order = np.array(get_length_grouped_indices(lengths.tolist(), BATCH * ranks))
    whole = len(order) // (BATCH * ranks) * BATCH * ranks
    parts = lengths[order[:whole]].reshape(-1, BATCH, ranks).transpose(0, 2, 1)
    return DataReport(order, np.full(parts.shape[:2], BATCH), parts.max(2), parts.sum(2))


def training(count):
    """CPU time per text of MiniLM's forward and backward passes, from batches of all costs, by turns."""
    data, loader = review_data()
    lengths = np.array([len(sample["input_ids"]) for sample in loader.dataset])
    samplers = {
        "batch 32": LengthBucketSampler(lengths, batch_size=BATCH),
        "token budget": LengthBucketSampler(lengths, max_tokens=BUDGET),
    }
    torch.manual_seed(0)
    model = TextClassifier(data.labels, class_counts=data.class_counts, tuning="full").train()
    chosen = {name: spread(order, lengths, count) for name, order in {"random": loader.order, **samplers}.items()}
    step(model, loader, chosen["batch 32"][0][0][:4])
    spent = dict.fromkeys(chosen, 0.0)
    for turn in range(count):
        for name, batches in chosen.items():
            part, texts = batches[turn]
            begin = time.process_time()
            step(model, loader, part)
            spent[name] += (time.process_time() - begin) / texts
    found = {name: {"ms_per_text": round(1e3 * value, 1)} for name, value in spent.items()}
    for name in samplers:
        found[name]["times"] = round(spent["random"] / spent[name], 2)
    return {**found, "batches_of_each": count, "goal": "3 and 4.5 times"}


def spread(order, lengths, count):
    """Batches from the middles of `count` parts of the epoch of equal cost, each part all of batches of like cost.

    With each, what its seconds are divided by to give its share of those of one text. A few dear batches of long texts
    are a large part of an epoch's time, which an equal share of the batches would miss.
    """
    plan = order.plan(1, order.limit)
    batches = sorted((plan.part(step_, 0, 1) for step_ in range(len(plan))), key=lambda part: cost(lengths, part))
    costs = np.array([cost(lengths, part) for part in batches])
    middles = (np.arange(count) + 0.5) / count * costs.sum()
    places = np.searchsorted(np.cumsum(costs), middles)
    return [(batches[place], len(lengths) * costs[place] / (costs.sum() / count)) for place in places]


def cost(lengths, part):
    return len(part) * int(lengths[part].max())


def step(model, loader, part):
    batch = loader.collate_fn([loader.dataset[int(sample)] for sample in part])
    model.zero_grad(set_to_none=True)
    logits = model(batch)
    torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()


def packing(small, large):
    """Rows of 2048, against best-fit-decreasing one document at a time with a sorted list of spaces."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, large), 1, 2048).astype(np.int32)
    bins = {}

    def own():
        bins["own"] = pack_best_fit(lengths[:small], 2048)[1]

    def other():
        bins["other"] = one_at_a_time(lengths[:small].tolist(), 2048)

    found = against(own, other, rounds=2)
    begin = time.process_time()
    pack_best_fit(lengths, 2048)
    seconds = round(time.process_time() - begin, 3)
    return {"documents": small, **found, "bins": bins, "own_seconds_of_ten_times_as_many": seconds, "goal": "20 times"}


def one_at_a_time(lengths, capacity):
    spaces = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(spaces, length)
        left = (spaces.pop(at) if at < len(spaces) else capacity) - length
        bisect.insort(spaces, left)
    return len(spaces)


def balancing(count):
    """An epoch's batches of indices, as a loader takes them, against WeightedRandomSampler's."""
    labels = np.random.default_rng(0).choice(3, count, p=[0.7, 0.25, 0.05]).astype(np.uint8)
    weights = torch.from_numpy((1 / np.bincount(labels))[labels])
    sampler = ClassBalancedSampler(labels, strategy=[1, 1, 1], batch_size=BATCH)
    other = WeightedRandomSampler(weights, count)

    def own():
        for _ in RankBatches(sampler, ((1, BATCH, 0),), 0):
            pass

    def theirs():
        batch = []
        for index in other:
            batch.append(index)
            if len(batch) == BATCH:
                batch = []

    return {"samples": count, **against(own, theirs, rounds=2), "goal": "8 times"}


def overhead():
    """An epoch of 100,000 small samples: torch's loader with a permutation, against ours."""
    data = torch.arange(100_000.0)[:, None].expand(-1, 16).contiguous()
    own = TricksDataLoader(data, batch_size=BATCH, shuffle=True, seed=0)
    other = DataLoader(data, batch_size=BATCH, shuffle=True)
    found = against(lambda: sum(1 for _ in own), lambda: sum(1 for _ in other), rounds=5)
    return {**found, "own_over_other": round(found["own_seconds"] / found["other_seconds"], 3), "goal": "1.02"}


def normalizing(rows):
    """One pass over rows of 64 features in chunks of 10,000, against scikit-learn's partial_fit."""
    from sklearn.preprocessing import StandardScaler

    chunks = [torch.randn(10_000, 64, dtype=torch.float64) * 3 + 5 for _ in range(20)]
    order = [chunks[index % 20] for index in range(rows // 10_000)]
    kept = {}

    def own():
        kept["own"] = FeatureNormalizer(64).fit(order)

    def other():
        kept["other"] = StandardScaler()
        for chunk in order:
            kept["other"].partial_fit(chunk.numpy())

    found = against(own, other, rounds=2)
    apart = kept["own"](chunks[0]) - torch.from_numpy(kept["other"].transform(chunks[0].numpy()))
    return {"rows": rows, **found, "largest_difference": float(apart.abs().max()), "goal": "1 time, equal to 1e-6"}


if __name__ == "__main__":
    main()
