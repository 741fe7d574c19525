"""LengthBucketSampler: every sample once, within the budget, as many steps on every rank and in every epoch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_tricks.data import ClassBalancedSampler, LengthBucketSampler, TricksDataLoader, loader
from lightning_tricks.data._plan import continued
from lightning_tricks.data._tails import gather_tails
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.batching import share_out

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)
OPTIONS = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(1, 9)}),
    st.fixed_dictionaries({"max_tokens": st.integers(60, 400), "pad_to": st.sampled_from([1, 4, (15, 30, 60)])}),
    st.fixed_dictionaries({"max_tokens": st.integers(16, 40), "too_long": st.just("own_batch")}),
    st.fixed_dictionaries({"max_tokens": st.integers(30, 70), "too_long": st.just("drop")}),
)
WORLDS = st.integers(1, 8)


def corpus(count=1500, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(3.3, 0.8, count), 2, 200).astype(int)


def parts(plan, world):
    """Each step's samples on each rank."""
    return [[plan.part(step, rank, world).tolist() for rank in range(world)] for step in range(len(plan))]


def flat(steps):
    return sorted(sample for step in steps for part in step for sample in part)


def made(lengths, **options):
    try:
        return LengthBucketSampler(lengths, **options)
    except DataError:
        assume(False)  # every sample is too long
        raise


def planned(sampler, world):
    try:
        return sampler.plan(world, sampler.limit)
    except DataError:
        assume(False)  # too few samples, or all fill a batch by themselves
        raise


@settings(max_examples=80, deadline=None)
@given(LENGTHS, OPTIONS, WORLDS, st.integers(1, 5), st.integers(0, 99))
def test_an_epoch_is_a_permutation_within_the_budget(lengths, options, world, window, seed):
    sampler = made(lengths, **options, window=window, seed=seed)
    kept = [i for i, c in enumerate(sampler.costs) if options.get("too_long") != "drop" or c <= sampler.limit]
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        steps = parts(planned(sampler, world), world)
        assert flat(steps) == kept
        assert len(steps) == sampler.steps(world, sampler.limit)
        for step in steps:
            sizes = [len(part) for part in step]
            assert min(sizes) >= 1
            assert "max_tokens" in options or max(sizes) - min(sizes) <= 1
            for part in step:
                cost = len(part) * int(sampler.costs[part].max())
                if "max_tokens" in options:
                    assert cost <= sampler.limit or (len(part) == 1 and options.get("too_long") == "own_batch")
                else:
                    # One more where the last step would leave a rank without a sample, and nobody can give one.
                    assert len(part) <= sampler.limit + (sampler.limit == 1)


MANY = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 500)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(MANY, st.integers(60, 130), WORLDS, st.integers(1, 100), st.integers(0, 9))
def test_every_epoch_has_the_promised_steps(runs, budget, world, window, seed):
    """Many samples of few lengths, most of which fill a batch by themselves: there is little to split."""
    lengths = np.repeat(*np.array(runs).T)
    sampler = LengthBucketSampler(lengths, max_tokens=budget, window=window, seed=seed)
    if fewest(lengths, sampler, world, budget) * world > len(lengths):
        with pytest.raises(DataError, match=r"cannot be shared out evenly|cannot give each of"):
            sampler.steps(world, budget)
        return
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        steps = parts(sampler.plan(world, budget), world)
        assert len(steps) == sampler.steps(world, budget)
        assert flat(steps) == list(range(len(lengths)))
        for step in steps:
            assert all(part and len(part) * lengths[part].max() <= budget for part in step)


def test_where_nearly_every_sample_fills_a_batch_alone():
    """A hundredth of the steps more than the fewest are as many as there are samples for: 203 of 8."""
    sampler = LengthBucketSampler([60] * 1587 + [40] * 37, max_tokens=100)
    steps = parts(sampler.plan(8, 100), 8)
    assert len(steps) == sampler.steps(8, 100) == 203
    assert flat(steps) == list(range(1624))


def test_several_steps_give_what_the_last_one_lacks():
    order, sizes = gather_tails(np.arange(24), np.array([9, 9, 6]), np.ones(24, int), 8, per_rank=None, budget=1)
    assert sizes.tolist() == [8, 8, 8]
    assert [*order[:8], *order[8:16]] == [*range(8), *range(9, 17)]
    assert sorted(order[16:].tolist()) == [8, 17, *range(18, 24)]


def test_other_steps_than_can_be_had_are_refused():
    sampler = LengthBucketSampler(corpus(), max_tokens=512)
    with pytest.raises(MisconfigurationError, match=r"1500 samples cannot be had in 2 steps on 4 .*leave it to"):
        sampler.plan(4, 512, steps=2)


def fewest(lengths, sampler, world, limit):
    """Steps, at least, by plain counting: the longest samples first, as many to a batch as it takes."""
    if not sampler.by_tokens:
        return max(1, len(lengths) // world if limit == 1 else -(-len(lengths) // (world * limit)))
    found, left = 0, sorted(lengths, reverse=True)
    while left:
        found, left = found + 1, left[max(1, limit // int(left[0])) :]
    return -(-found // world)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, OPTIONS, WORLDS, WORLDS, st.data())
def test_an_interrupted_epoch_goes_on_sample_exactly(lengths, options, before, after, data):
    sampler = made(lengths, **options, window=2)
    steps = parts(planned(sampler, before), before)
    planned(sampler, after)
    taken = data.draw(st.integers(1, len(steps)))
    left, wanted = flat(steps[taken:]), sampler.steps(after, sampler.limit) - taken
    segments = [(before, sampler.limit, taken), (after, sampler.limit, 0)]
    # What is impossible is refused, and nothing else.
    if wanted < 1 or len(left) < wanted * after or fewest(sampler.costs[left], sampler, after, sampler.limit) > wanted:
        with pytest.raises(MisconfigurationError, match="Lightning counts on that number"):
            continued(sampler, segments)
        return
    plan, done = continued(sampler, segments)
    second = parts(plan, after)
    assert done == taken
    assert flat(steps[:taken] + second) == flat(steps)
    assert taken + len(plan) == sampler.steps(after, sampler.limit)
    for part in (part for step in second for part in step):
        cost = len(part) * int(sampler.costs[part].max())
        if sampler.by_tokens:
            assert cost <= sampler.limit or (len(part) == 1 and options.get("too_long") == "own_batch")
        else:
            assert len(part) <= sampler.limit + (sampler.limit == 1)


def test_fewer_ranks_go_on_in_mid_epoch_by_tokens():
    sampler = LengthBucketSampler(corpus(), max_tokens=512, window=10)
    steps = parts(sampler.plan(2, 512), 2)
    for taken in (1, 20, len(steps) // 2):
        plan, _ = continued(sampler, [(2, 512, taken), (1, 512, 0)])
        assert flat(steps[:taken] + parts(plan, 1)) == list(range(1500))
        assert taken + len(plan) == sampler.steps(1, 512)
    with pytest.raises(MisconfigurationError, match=r"samples left cannot be had in the .* steps that are left on 1"):
        continued(sampler, [(2, 512, len(steps) - 1), (1, 512, 0)])


def test_more_ranks_with_a_smaller_budget_go_on_in_mid_epoch():
    sampler = LengthBucketSampler(corpus(), max_tokens=512, window=10)
    steps = parts(sampler.plan(1, 512), 1)
    plan, _ = continued(sampler, [(1, 512, 30), (2, 256, 0)])
    assert flat(steps[:30] + parts(plan, 2)) == list(range(1500))
    with pytest.raises(MisconfigurationError, match=r"samples left cannot be had in the .* steps that are left on 2"):
        continued(sampler, [(1, 512, 60), (2, 512, 0)])


def test_epochs_differ_and_repeat():
    sampler = LengthBucketSampler(corpus(), max_tokens=512)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(parts(sampler.plan(1, 512), 1))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != parts(LengthBucketSampler(corpus(), max_tokens=512, seed=1).plan(1, 512), 1)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("options", [{"max_tokens": 512}, {"batch_size": 16}])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_order_does_not_leak_the_length(options, world, balanced):
    sampler = within = LengthBucketSampler(corpus(20_000), **options)
    if balanced:
        sampler = ClassBalancedSampler((corpus(20_000) % 7 == 0).astype(int), strategy="square_root", within=within)
    steps = parts(sampler.plan(world, sampler.limit), world)
    for rank in range(world):
        longest = [within.costs[step[rank]].max() for step in steps]
        assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 4 / np.sqrt(len(longest))


def test_little_is_wasted_and_ranks_wait_little():
    lengths = corpus(20_000)
    for options, waste in (({"batch_size": 32}, 0.09), ({"max_tokens": 2048}, 0.03)):
        sampler = LengthBucketSampler(lengths, **options)
        steps = parts(sampler.plan(8, sampler.limit), 8)
        costs = np.array([[len(part) * lengths[part].max() for part in step] for step in steps])
        assert 1 - lengths.sum() / costs.sum() < waste
        assert lengths.sum() / (8 * costs.max(1)).sum() > (0.9 if sampler.by_tokens else 0.85)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_no_division_among_ranks_is_cheaper(lengths, world):
    """Against every division of a small step into contiguous parts."""
    assume(len(lengths) >= world)
    falling = np.array(sorted(lengths, reverse=True))

    def dearest(starts):
        return max(falling[a] * (b - a) for a, b in itertools.pairwise([*starts, len(falling)]))

    best = min(dearest((0, *rest)) for rest in itertools.combinations(range(1, len(falling)), world - 1))
    assert dearest(share_out(falling, world, 81)) == best


def test_no_short_window_is_left_at_the_end():
    """1.3 windows are one: their rest alone would be half padding."""
    lengths = corpus(4160)
    wide, usual = (LengthBucketSampler(lengths, batch_size=32, window=window) for window in (130, 100))
    assert parts(usual.plan(1, 32), 1) == parts(wide.plan(1, 32), 1)


def test_one_device_sees_the_global_batches_of_two():
    sampler = LengthBucketSampler(corpus(300), batch_size=4, window=10)
    two = [sorted(first + second) for first, second in parts(sampler.plan(2, 4), 2)]
    alone = LengthBucketSampler(corpus(300), batch_size=8, window=10)
    assert sorted(sorted(step[0]) for step in parts(alone.plan(1, 8), 1)) == sorted(two)


def test_ranks_take_turns_in_having_the_longest():
    sampler = LengthBucketSampler(corpus(), max_tokens=512)
    lengths = np.array([[sampler.costs[part].max() for part in step] for step in parts(sampler.plan(4, 512), 4)])
    assert set(lengths.argmax(1)) == {0, 1, 2, 3}


def test_padding_to_a_multiple_or_to_few_shapes_counts():
    lengths = [3, 5, 9, 9]
    by_8 = LengthBucketSampler(lengths, max_tokens=16, pad_to=8)
    assert by_8.costs.tolist() == [8, 8, 16, 16]
    assert LengthBucketSampler(lengths, max_tokens=16, pad_to=(6, 10)).costs.tolist() == [6, 6, 10, 10]
    with pytest.raises(DataError, match=r"length 9 has no place in `pad_to=\(4, 8\)`"):
        LengthBucketSampler(lengths, max_tokens=16, pad_to=(4, 8))


def test_what_is_too_long():
    lengths = [4, 4, 40, 3]
    with pytest.raises(DataError, match="Sample 2 has length 40, padded 40, and 0 more exceed `max_tokens=8`"):
        LengthBucketSampler(lengths, max_tokens=8)
    alone = LengthBucketSampler(lengths, max_tokens=8, too_long="own_batch", window=1)
    assert [2] in [step[0] for step in parts(alone.plan(1, 8), 1)]
    dropped = LengthBucketSampler(lengths, max_tokens=8, too_long="drop")
    assert (dropped.dropped, flat(parts(dropped.plan(1, 8), 1))) == (1, [0, 1, 3])
    cut = LengthBucketSampler(lengths, max_tokens=10, too_long="truncate", pad_to=4)
    assert (cut.max_length, cut.costs.tolist()) == (8, [4, 4, 8, 4])
    with pytest.raises(DataError, match="Every sample is longer than `max_tokens=2`"):
        LengthBucketSampler(lengths, max_tokens=2, too_long="drop")


def test_truncation_needs_a_collator_that_cuts():
    sampler = LengthBucketSampler([4, 40], max_tokens=8, too_long="truncate")
    with pytest.raises(MisconfigurationError, match=r"cuts samples to 8 tokens .*`max_length`, which is None"):
        TricksDataLoader(range(2), sampler=sampler)


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        ([3, 0, 0], {}, DataError, "Sample 1 has length 0, and 1 more"),
        ([3, -4], {}, DataError, "Sample 1 has length -4"),
        ([2**31], {}, DataError, "Sample 0 has length 2147483648"),
        ([], {}, DataError, "sequence of whole numbers"),
        ([1.5], {}, DataError, "got shape .* of float64"),
        ([[1]], {}, DataError, r"got shape \(1, 1\)"),
        ([1], {"batch_size": 2, "max_tokens": 4}, MisconfigurationError, "`batch_size=2` or `max_tokens=4`, not both"),
        ([1], {"batch_size": 0}, MisconfigurationError, "`batch_size` must be"),
        ([1], {"max_tokens": 0}, MisconfigurationError, "`max_tokens` must be"),
        ([1], {"window": 0}, MisconfigurationError, "`window` must be"),
        ([1], {"seed": -1}, MisconfigurationError, "`seed` must be"),
        ([1], {"pad_to": 0}, MisconfigurationError, "`pad_to` must be"),
        ([1], {"too_long": "cut"}, MisconfigurationError, "`too_long` must be one of own_batch, truncate"),
        ([9], {"max_tokens": 3, "pad_to": 4, "too_long": "truncate"}, MisconfigurationError, "less than any length"),
    ],
)
def test_bad_options(lengths, options, error, message):
    with pytest.raises(error, match=message):
        LengthBucketSampler(lengths, **options)


def test_bad_sizes():
    with pytest.raises(DataError, match="There are 3 lengths, but 4 samples"):
        TricksDataLoader(range(4), sampler=LengthBucketSampler([1, 2, 3]))
    with pytest.raises(DataError, match=r"3 sample\(s\) cannot give each of 4 devices"):
        LengthBucketSampler([1, 2, 3]).steps(4, 32)
    with pytest.raises(DataError, match="5 samples cannot be shared out evenly to 2 devices in batches of"):
        LengthBucketSampler([9] * 5, max_tokens=9).steps(2, 9)


def bucketed(lengths, workers=0, **options):
    sampler = LengthBucketSampler(lengths, max_tokens=300, window=5, **options)
    return TricksDataLoader(torch.arange(len(lengths)), sampler=sampler, num_workers=workers)


def test_other_data_is_refused_in_mid_epoch():
    lengths = corpus(200)
    one = bucketed(lengths)
    next(iter(one))
    lengths[7] += 1
    with pytest.raises(MisconfigurationError, match=r"with fingerprint of the lengths=.*, but now fingerprint"):
        bucketed(lengths).load_state_dict(one.state_dict())


def test_another_choice_of_samples_is_refused_in_mid_epoch():
    """Half the budget on twice the ranks would be the same steps, but it drops other samples."""
    lengths = corpus(200)

    def make(budget):
        sampler = LengthBucketSampler(lengths, max_tokens=budget, window=5, too_long="drop")
        return TricksDataLoader(torch.arange(200), sampler=sampler)

    one = make(100)
    next(iter(one))
    make(200).load_state_dict(make(200).state_dict())
    with pytest.raises(MisconfigurationError, match=r"with fingerprint of the lengths=.*, but now fingerprint"):
        make(50).load_state_dict(one.state_dict())


def test_another_version_s_order_is_refused_in_mid_epoch():
    one = bucketed(corpus(200))
    next(iter(one))
    before = {name: value for name, value in one.state_dict().items() if "version" not in name}
    with pytest.raises(MisconfigurationError, match="with order's version=None, but now order's version=2"):
        bucketed(corpus(200)).load_state_dict(before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_two_resumes_in_one_epoch(workers):
    lengths = corpus(300)
    whole = bucketed(lengths, workers)
    whole.set_epoch(3)
    expected, found = [batch.tolist() for batch in whole], []
    state = {**bucketed(lengths).state_dict(), "epoch": 3}
    for count in (3, 2, 99):
        part = bucketed(lengths, workers)
        part.load_state_dict(state)
        for _, batch in zip(range(count), part, strict=False):
            found.append(batch.tolist())
            state = part.state_dict()
    assert found == expected
    assert len(whole) == len(expected)


def test_a_second_change_of_ranks_in_one_epoch(monkeypatch):
    lengths = corpus(400)
    seen, state = [], None
    for world, count in ((4, 3), (2, 5), (1, 999)):
        states = []
        for rank in range(world):
            monkeypatch.setattr(loader, "ranks", lambda rank=rank, world=world: (rank, world))
            part = bucketed(lengths)
            if state is not None:
                part.load_state_dict(state)
            for _, batch in zip(range(count), part, strict=False):
                seen += batch.tolist()
                latest = part.state_dict()
            states.append(latest)
        assert all(other == states[0] for other in states)
        state = states[0]
    assert sorted(seen) == list(range(400))
    assert state["batches"] == state["length"] == len(bucketed(lengths))
