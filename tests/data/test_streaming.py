"""StreamingSampler: every row once on any number of ranks, read in bounded memory, resumed exactly."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tricks.data import (
    DynamicPaddingCollator,
    IterableSource,
    LengthBucketSampler,
    StreamingSampler,
    TricksDataLoader,
    loader,
    measure_lengths,
    report,
)
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.streaming import nearby_order


def source_of(sizes):
    """Row n of the source is n."""
    stops = np.cumsum(sizes).tolist()
    return IterableSource([range(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)], rows=sizes)


def lengths_of(count, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(2.5, 0.8, count), 1, 80).astype(np.int64)


SIZES = [40, 7, 1, 93, 20, 64, 31]
COUNT = sum(SIZES)
OPTIONS = {
    "fixed": {"batch_size": 5},
    "buckets": {"batch_size": 5, "lengths": lengths_of(COUNT)},
    "budget": {"max_tokens": 160, "lengths": lengths_of(COUNT)},
}


def sampler_of(sizes=SIZES, **options):
    return StreamingSampler(source_of(sizes), **{"window": 4, "buffer": 16, **options})


def parts_of(sampler, world, plan=None):
    plan = plan or sampler.plan(world, sampler.limit)
    return [[plan.part(step, rank, world).tolist() for rank in range(world)] for step in range(len(plan))]


def flat(steps):
    return [row for step in steps for part in step for row in part]


@pytest.mark.parametrize(("count", "reach"), [(1, 0), (9, 0), (5000, 100), (9000, 5000), (4096, 4096), (50, 999)])
def test_a_nearby_shuffle_moves_nothing_far_and_starts_anywhere(count, reach):
    whole = np.concatenate(list(nearby_order(count, reach, (3,))))
    assert sorted(whole.tolist()) == list(range(count))
    assert np.abs(whole - np.arange(count)).max() <= reach
    assert (reach == 0) == (whole == np.arange(count)).all()
    for start in {0, 1, count // 3, count - 1, 4095, 4096, 4097, *range(4990, 5010), *range(5100, count, 97)} & set(
        range(count)
    ):
        assert np.concatenate(list(nearby_order(count, reach, (3,), start))).tolist() == whole[start:].tolist()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_an_epoch_is_a_permutation_in_the_same_steps_on_every_rank_and_in_every_epoch(world, options):
    sampler = sampler_of(**OPTIONS[options])
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        steps = parts_of(sampler, world)
        assert sorted(flat(steps)) == list(range(COUNT))
        assert all(part for step in steps for part in step)
        assert len(steps) == sampler.steps(world, sampler.limit)
        orders.append(flat(steps))
    assert len({tuple(order) for order in orders}) == 4


def test_fixed_batches_are_full_but_for_the_last():
    sizes = [len(part) for step in parts_of(sampler_of(batch_size=5), 3) for part in step]
    assert sizes[:-3] == [5] * (len(sizes) - 3)
    assert max(sizes[-3:]) - min(sizes[-3:]) <= 1


def test_a_budget_holds_and_ranks_cost_the_same():
    sizes, lengths = [500] * 16, lengths_of(8000)
    costs = -(-lengths // 8) * 8
    padded = sampler_of(sizes, lengths=lengths, max_tokens=800, window=20, buffer=300, pad_to=8)
    assert max(len(p) * costs[p].max() for step in parts_of(padded, 4) for p in step) <= 800
    sampler = sampler_of(sizes, lengths=lengths, max_tokens=800, window=20, buffer=300)
    cost = np.array([[len(p) * lengths[p].max() for p in step] for step in parts_of(sampler, 4)])
    assert cost.max() <= 800
    assert lengths.sum() / (4 * cost.max(axis=1).sum()) > 0.88
    fixed = parts_of(sampler_of(sizes, lengths=lengths, batch_size=32, window=20, buffer=300), 4)
    longest = np.array([[lengths[p].max() for p in step] for step in fixed])
    assert lengths.sum() / (32 * longest.max(axis=1)).sum() / 4 > 0.78  # a random order: 0.35
    correlation = np.corrcoef(longest[:-1, 0], longest[1:, 0])[0, 1]
    assert abs(correlation) < 0.2, "the order leaks length"


def drawn(count, seed):
    """Evenly distributed numbers below one, the same with every version of numpy."""
    words = np.random.PCG64(np.random.SeedSequence([seed])).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53


def shards_that_differ(shards, rows, seed=0):
    """Lengths of which the means of shards go from 20 to 400, and those of a shard's rows by a factor of four."""
    means = 20 * 20 ** drawn(shards, seed)
    return np.clip(np.repeat(means, rows) * 4 ** (drawn(shards * rows, seed + 1) - 0.5), 1, 800).astype(np.int64)


def test_ranks_cost_the_same_where_shards_differ_in_length():
    lengths = shards_that_differ(64, 200)
    sampler = sampler_of([200] * 64, lengths=lengths, max_tokens=4096, window=100, buffer=500)
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        steps = parts_of(sampler, 8)
        assert len(steps) == sampler.steps(8, 4096)
        assert sorted(flat(steps)) == list(range(64 * 200))
        cost = np.array([[len(part) * lengths[part].max() for part in step] for step in steps])
        assert cost.max() <= 4096
        assert lengths.sum() / (8 * cost.max(axis=1).sum()) >= 0.95
        assert abs(np.corrcoef(cost[:-1, 0], cost[1:, 0])[0, 1]) < 4 / np.sqrt(len(steps)), "the order leaks the cost"


@pytest.mark.parametrize("seed", range(4))
def test_every_epoch_has_the_promised_steps_where_shards_differ(seed):
    """Two shards of long rows and two of short ones: which ranks have those depends on the epoch."""
    lengths = np.repeat([100, 100, 10, 10], 1000)
    sampler = sampler_of([1000] * 4, lengths=lengths, max_tokens=1000, window=5, buffer=100, seed=seed)
    for epoch in range(6):
        sampler.set_epoch(epoch)
        plan = sampler.plan(2, 1000)
        assert len(plan) == sampler.steps(2, 1000)
        assert len(plan) < 1.1 * 110
        assert np.sort(plan.rest(0)).tolist() == list(range(4000))


SHARDS = st.lists(st.tuples(st.integers(1, 80), st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(SHARDS, st.integers(60, 400), st.integers(2, 5), st.integers(1, 20), st.integers(0, 9))
def test_an_epoch_of_any_shards_is_a_permutation_within_the_budget(shards, budget, world, window, seed):
    """Shards of a size, a length, and a few longer rows each."""
    lengths = np.concatenate([length + np.arange(rows) % (more + 1) for rows, length, more in shards])
    sizes = [rows for rows, _, _ in shards]
    sampler = sampler_of(sizes, lengths=lengths, max_tokens=max(63, budget), window=window, seed=seed)
    try:
        steps = sampler.steps(world, sampler.limit)
    except DataError:  # only where nearly all rows fill a batch alone, and cannot be dealt out without rest
        alone = (lengths > sampler.limit // 2).sum()
        assert len(lengths) < world or (len(lengths) % world and alone >= len(lengths) // world)
        return
    for epoch in range(4):
        sampler.set_epoch(epoch)
        found = parts_of(sampler, world)
        assert len(found) == steps
        assert sorted(flat(found)) == list(range(len(lengths)))
        assert all(part and len(part) * lengths[part].max() <= sampler.limit for step in found for part in step)


def test_a_row_longer_than_several_ranks_parts():
    sampler = sampler_of([8], lengths=[1, 1, 1, 9, 1, 1, 1, 1], max_tokens=9, buffer=None)
    steps = parts_of(sampler, 4)
    assert len(steps) == sampler.steps(4, 9)
    assert sorted(flat(steps)) == list(range(8))


def test_long_rows_in_one_shard_alone():
    """A rank may have nothing but rows that fill a batch alone, as many as steps: the others' pools must agree."""
    lengths = np.repeat([90, 5, 7, 80, 3], 120)
    sampler = sampler_of([120] * 5, lengths=lengths, max_tokens=100, window=10, buffer=50)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        for world in (2, 3, 4):
            found = parts_of(sampler, world)
            assert len(found) == sampler.steps(world, 100) < 1.1 * 240 / world + 20
            assert sorted(flat(found)) == list(range(600))
            assert all(part and len(part) * lengths[part].max() <= 100 for step in found for part in step)


def test_rows_are_read_in_a_bounded_stretch(monkeypatch):
    """Each rank reads each of its blocks once, in shards' order, and holds a bounded number of rows."""
    sizes = [1000] * 60
    source = source_of(sizes)
    read = []
    original = IterableSource.read
    monkeypatch.setattr(IterableSource, "read", lambda self, *at: read.append(at) or original(self, *at))
    sampler = StreamingSampler(source, lengths_of(60_000), batch_size=10, window=20, buffer=500)
    plan = sampler.plan(2, 10)
    held = 0
    for step in range(len(plan)):
        source.__getitems__(plan.part(step, 1, 2).tolist())
        held = max(held, source._held.rows)
    assert len(read) == 30
    assert len({shard for shard, _ in read}) == 30
    assert held <= 3000


def test_without_a_buffer_shards_alone_are_shuffled_and_with_none_nothing():
    order = flat(parts_of(sampler_of(batch_size=5, buffer=0), 1))
    assert order != list(range(COUNT))
    firsts = np.cumsum(SIZES) - SIZES
    assert np.flatnonzero(np.diff(order) != 1).size <= len(SIZES) - 1
    assert {order[0], *(order[at + 1] for at in np.flatnonzero(np.diff(order) != 1))} <= set(firsts.tolist())
    assert flat(parts_of(sampler_of(batch_size=5, buffer=None), 1)) == list(range(COUNT))


def test_what_is_too_long():
    lengths = lengths_of(COUNT)
    lengths[[3, 200]] = 500
    with pytest.raises(DataError, match="Sample 3 has length 500"):
        sampler_of(lengths=lengths, max_tokens=160)
    dropped = sampler_of(lengths=lengths, max_tokens=160, too_long="drop")
    assert sorted(flat(parts_of(dropped, 2))) == sorted(set(range(COUNT)) - {3, 200})
    alone = flat(
        [
            [part]
            for step in parts_of(sampler_of(lengths=lengths, max_tokens=160, too_long="own_batch"), 2)
            for part in step
            if 3 in part
        ]
    )
    assert alone == [3]
    cut = sampler_of(lengths=lengths, max_tokens=160, too_long="truncate")
    with pytest.raises(MisconfigurationError, match="cuts samples to 160 tokens"):
        TricksDataLoader(source_of(SIZES), sampler=cut)
    TricksDataLoader(source_of(SIZES), sampler=cut, collate_fn=DynamicPaddingCollator(max_length=160))


def test_rows_that_fill_batches_alone():
    """Five on one rank and four on the other cannot make equally many batches; ten can."""
    with pytest.raises(DataError, match=r"9 rows cannot be had in equally many batches within `max_tokens=50`"):
        sampler_of([9], lengths=[40] * 9, max_tokens=50).steps(2, 50)
    assert sampler_of([10], lengths=[40] * 10, max_tokens=50).steps(2, 50) == 5
    lengths = [40] * 9 + [2] * 9  # pools of few rows may lack short ones: they are made larger
    for seed in range(5):
        sampler = sampler_of([18], lengths=lengths, max_tokens=50, window=1, seed=seed)
        assert sorted(flat(parts_of(sampler, 2))) == list(range(18))


# -- positions ---------------------------------------------------------------------------------------------------------


def make(workers=0, **options):
    sampler = sampler_of(**options)
    return TricksDataLoader(source_of(SIZES), sampler=sampler, num_workers=workers)


def batches(source):
    return [batch.tolist() for batch in source]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_resumes_in_one_epoch(options, workers):
    whole = make(**OPTIONS[options])
    whole.set_epoch(3)
    expected, found = batches(whole), []
    assert len(expected) == len(whole) > 10
    state = {**whole.state_dict(), "batches": 0}
    for count in (3, 6, 99):
        part = make(workers, **OPTIONS[options])
        part.load_state_dict(state)
        for _, batch in zip(range(count), part, strict=False):
            found.append(batch.tolist())
            state = part.state_dict()
    assert found == expected


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    kind=st.sampled_from(["fixed", "buckets", "budget"]),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    taken=st.integers(0, 30),
    seed=st.integers(0, 5),
)
def test_on_other_ranks_every_row_comes_once_or_it_is_refused(sizes, kind, worlds, taken, seed):
    count = sum(sizes)
    options = {"fixed": {"batch_size": 3}, "buckets": {"batch_size": 3, "lengths": lengths_of(count, seed)}}
    options["budget"] = {"max_tokens": 200, "lengths": lengths_of(count, seed)}
    sampler = sampler_of(sizes, **options[kind], seed=seed)
    before, after = worlds
    if count < max(worlds):
        return
    plan = sampler.plan(before, sampler.limit)
    taken = min(taken, len(plan))
    seen = flat(parts_of(sampler, before, plan)[:taken])
    rest = plan.rest(taken)
    assert sorted([*seen, *rest.tolist()]) == list(range(count))
    left = sampler.steps(after, sampler.limit) - taken
    if left < 1 or len(rest) < left * after or not covered(sampler, rest, after, left):
        with pytest.raises(MisconfigurationError, match="Lightning counts on that number"):
            sampler.plan(after, sampler.limit, 1, rest, left)
        return
    steps = parts_of(sampler, after, sampler.plan(after, sampler.limit, 1, rest, left))
    assert len(steps) == left
    assert all(part for step in steps for part in step)
    assert sorted([*seen, *flat(steps)]) == list(range(count))
    largest = max(len(p) * (sampler.costs[p].max() if sampler.by_tokens else 1) for step in steps for p in step)
    assert largest <= sampler.limit + (not sampler.by_tokens)


def covered(sampler, rest, world, steps):
    """Whether parts of so many batches each, filled one after the other, hold all rows."""
    if not sampler.by_tokens:
        return len(rest) - steps * world * sampler.limit < world
    order = sampler._rows((sampler.seed, sampler.epoch), rest)[np.arange(len(rest))].tolist()
    for _ in range(world):
        part = []
        while order and batches_needed([*part, sampler.costs[order[0]]], sampler.limit) <= steps:
            part.append(sampler.costs[order.pop(0)])
    return not order


def batches_needed(lengths, budget):
    found, left = 0, sorted(lengths, reverse=True)
    while left:
        found, left = found + 1, left[max(1, budget // int(left[0])) :]
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_the_loader_goes_on_on_other_ranks(monkeypatch, before, after, options):
    def on(rank, world, state=None, steps=99):
        monkeypatch.setattr(loader, "ranks", lambda: (rank, world))
        limit = {"max_tokens": 160 * 4 // world} if options == "budget" else {"batch_size": 4 * 4 // world}
        one = make(**{**OPTIONS[options], **limit})
        if state is not None:
            one.load_state_dict(state)
        found = []
        for _, batch in zip(range(steps), one, strict=False):
            found += batch.tolist()
            state = one.state_dict()
        return found, state

    first = [on(rank, before, steps=4) for rank in range(before)]
    assert all(state == first[0][1] for _, state in first)
    second = [on(rank, after, first[0][1]) for rank in range(after)]
    assert sorted(row for found, _ in [*first, *second] for row in found) == list(range(COUNT))


def test_another_choice_of_rows_is_refused_in_mid_epoch():
    def drop(budget):
        return make(max_tokens=budget, lengths=lengths_of(COUNT), too_long="drop")

    one = drop(40)
    next(iter(one))
    drop(40).load_state_dict(one.state_dict())
    with pytest.raises(MisconfigurationError, match="with fingerprint of the lengths="):
        drop(20).load_state_dict(one.state_dict())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"batch_size": 2, "max_tokens": 9}, "Pass `batch_size=2` or `max_tokens=9`, not both"),
        ({"max_tokens": 9}, "`max_tokens` needs `lengths`"),
        ({"buffer": -1}, "`buffer` must be"),
        ({"window": 0}, "`window` must be"),
        ({"lengths": [1, 2]}, f"There are 2 lengths, but {COUNT} rows"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        sampler_of(**options)


def test_what_is_no_source():
    with pytest.raises(MisconfigurationError, match=r"needs a source of shards, got range. Wrap it: ParquetSource"):
        StreamingSampler(range(4))
    with pytest.raises(DataError, match=f"source has {COUNT} rows, the loader's dataset 3"):
        TricksDataLoader(range(3), sampler=sampler_of())
    with pytest.raises(DataError, match=r"1 sample\(s\) cannot give each of 2 devices"):
        sampler_of([1]).plan(2, 32)


def test_an_iterable_is_refused_with_the_remedy():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(4))

    for refused in (
        lambda: TricksDataLoader(Stream(), batch_size=1, shuffle=False, seed=0),
        lambda: TricksDataLoader(Stream(), sampler=LengthBucketSampler([1, 1, 1, 1])),
        lambda: measure_lengths(Stream()),
    ):
        with pytest.raises(
            MisconfigurationError, match=r"got Stream\. .*IterableSource\(\[dataset\]\), or ParquetSource"
        ):
            refused()
    source = IterableSource([Stream()])
    one = TricksDataLoader(source, sampler=StreamingSampler(source, batch_size=2))
    assert sorted(chain(*batches(one))) == [0, 1, 2, 3]


# -- what the data hold ------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """As many rows, of which only the dataset itself knows whether they are others."""

    def __init__(self, content):
        self.content = content

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return index

    def fingerprint(self):
        return self.content


def test_other_content_is_refused_in_mid_epoch_and_an_older_checkpoint_goes_on():
    def make(content):
        return TricksDataLoader(Rows(content), batch_size=2, shuffle=True, seed=0)

    one = make("a")
    iterator = iter(one)
    first = next(iterator).tolist()
    state = one.state_dict()
    with pytest.raises(MisconfigurationError, match="fingerprint of the data=a, but now fingerprint of the data=b"):
        make("b").load_state_dict(state)
    older = make("b")
    older.load_state_dict({name: value for name, value in state.items() if name != "fingerprint of the data"})
    assert sorted([*first, *chain(*batches(older))]) == list(range(9))
    list(iterator)
    make("b").load_state_dict(one.state_dict())


def test_the_report_of_a_stream():
    found = report(make(**OPTIONS["budget"]), ranks=2)
    lengths = OPTIONS["budget"]["lengths"]
    assert sorted(found.lengths.tolist()) == sorted(lengths.tolist())
    plan = sampler_of(**OPTIONS["budget"]).plan(2, 160)
    assert found.counts.tolist() == [[len(part) for part in step] for step in parts_of(None, 2, plan)]
    assert (found.counts * found.widths).max() <= 160
