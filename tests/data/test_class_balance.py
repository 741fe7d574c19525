"""ClassBalancedSampler: shares to the sample, on any number of ranks, also with a token budget."""

from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_tricks.data import ClassBalancedSampler, LengthBucketSampler, TricksDataLoader
from lightning_tricks.errors import DataError, DegradedWarning, MisconfigurationError
from lightning_tricks.mixins import ClassWeightedLossMixin, EffectiveNumber, LogitAdjusted
from tests.trainers import quiet_trainer

LABELS = np.repeat([0, 1, 2], [70, 25, 5])


def parts(sampler, world):
    plan = sampler.plan(world, sampler.limit)
    return [[plan.part(step, rank, world).tolist() for rank in range(world)] for step in range(len(plan))]


def counts(steps):
    return np.bincount([LABELS[sample] for step in steps for part in step for sample in part], minlength=3).tolist()


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("oversample", [70, 70, 70]),
        ("undersample", [5, 5, 5]),
        ("square_root", [53, 32, 15]),  # of 100: 53.7 to 32.1 to 14.4, rounded to the largest remainders
        ([1, 1.37, 6.75], [11, 15, 74]),
        ([0, 1, 1], [0, 50, 50]),
    ],
)
@pytest.mark.parametrize("by_tokens", [False, True])
def test_classes_come_as_often_as_asked_for(strategy, expected, world, by_tokens):
    if strategy == "square_root":
        roots = np.sqrt([70, 25, 5])
        expected = np.round(100 * roots / roots.sum()).astype(int).tolist()
    lengths = np.random.default_rng(0).integers(1, 40, 100)
    within = LengthBucketSampler(lengths, max_tokens=120) if by_tokens else None
    batch_size = None if by_tokens else 1 if strategy == "undersample" else 4
    sampler = ClassBalancedSampler(LABELS, strategy=strategy, batch_size=batch_size, within=within)
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        steps = parts(sampler, world)
        assert counts(steps) == expected == sampler.drawn.tolist()
        assert len(steps) == sampler.steps(world, sampler.limit)
        assert all(part for step in steps for part in step)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_every_sample_of_a_class_comes_equally_often(by_tokens):
    lengths = np.random.default_rng(0).integers(1, 40, 100)
    within = LengthBucketSampler(lengths, max_tokens=200) if by_tokens else None
    sampler = ClassBalancedSampler(LABELS, within=within)
    total = Counter()
    for epoch in range(300):
        drawn = Counter(sampler.draw(epoch).tolist())
        assert {drawn[sample] for sample in range(70)} == {1}
        assert {drawn[sample] for sample in range(70, 95)} == {2, 3}
        assert {drawn[sample] for sample in range(95, 100)} == {14}
        total.update(drawn)
    # 70 = 2 * 25 + 20: a sample's extra turn is one of chance 0.8.
    extra = np.array([total[sample] for sample in range(70, 95)]) / 300 - 2
    assert abs(extra - 0.8).max() < 5 * np.sqrt(0.8 * 0.2 / 300)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(0, 50))
def test_every_epoch_has_the_same_number_of_steps(data, world, seed):
    labels = data.draw(st.lists(st.integers(0, 2), min_size=10, max_size=80))
    assume(set(labels) == {0, 1, 2})
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=len(labels), max_size=len(labels)))
    strategy = data.draw(st.sampled_from(["oversample", "undersample", "square_root"]))
    within = LengthBucketSampler(lengths, max_tokens=data.draw(st.integers(30, 200)), window=2)
    sampler = ClassBalancedSampler(labels, strategy=strategy, within=within, seed=seed)
    assume(sampler.drawn.sum() >= 2 * world)
    longest = sorted((lengths[sample] for sample in sampler.longest_draw().tolist()), reverse=True)
    batches, at = 0, 0
    while at < len(longest):
        batches, at = batches + 1, at + sampler.limit // longest[at]
    if -(-batches // world) > len(longest) // world:  # too many fill a batch alone
        with pytest.raises(DataError, match="cannot be shared out evenly"):
            sampler.steps(world, sampler.limit)
        return
    for epoch in range(6):
        sampler.set_epoch(epoch)
        steps = parts(sampler, world)
        assert len(steps) == sampler.steps(world, sampler.limit)
        assert sorted(s for step in steps for part in step for s in part) == sorted(sampler.draw(epoch).tolist())
        for step in steps:
            for part in step:
                assert len(part) * max(lengths[sample] for sample in part) <= sampler.limit


def test_more_samples_than_torch_s_multinomial_takes():
    labels = np.zeros(2**24 + 5, np.uint8)
    labels[-3:] = 1
    sampler = ClassBalancedSampler(labels, strategy=[1, 1e-6])
    assert sampler.drawn.tolist() == [2**24 + 5 - 17, 17]
    drawn = sampler.draw(0)
    assert (drawn >= 2**24 + 2).sum() == 17
    by_millions = ClassBalancedSampler(labels, strategy=[1, 1e-6], batch_size=2**22)
    plan = by_millions.plan(2, 2**22)
    shares = [[plan.part(step, rank, 2) for rank in (0, 1)] for step in range(len(plan))]
    assert [[len(part) for part in step] for step in shares] == [[2**22, 2**22]] * 2 + [[3, 2]]
    found = np.bincount(np.concatenate([part for step in shares for part in step]), minlength=len(labels))
    assert np.array_equal(found, np.bincount(drawn, minlength=len(labels)))


def test_lengths_of_more_samples_than_that():
    """Every sample once, on two ranks, and neighbours in length together."""
    count = 2**24 + 5
    lengths = np.ones(count, np.uint8)
    lengths[::2] = 2
    plan = LengthBucketSampler(lengths, batch_size=2**22).plan(2, 2**22)
    shares = [plan.part(step, rank, 2) for step in range(len(plan)) for rank in (0, 1)]
    assert (np.bincount(np.concatenate(shares), minlength=count) == 1).all()
    assert sum(len(np.unique(lengths[part])) > 1 for part in shares) <= 1


def test_resumed_in_mid_epoch_and_refused_with_other_labels():
    def make(labels=LABELS, **options):
        return TricksDataLoader(torch.arange(100), sampler=ClassBalancedSampler(labels, batch_size=8, **options))

    one = make()
    expected = [batch.tolist() for batch in make()]
    for _, _ in zip(range(5), one, strict=False):
        state = one.state_dict()
    other = make()
    other.load_state_dict(state)
    assert [batch.tolist() for batch in other] == expected[5:]
    changed = LABELS.copy()
    changed[0] = 2
    with pytest.raises(MisconfigurationError, match="with fingerprint of the labels="):
        make(changed).load_state_dict(state)
    with pytest.raises(MisconfigurationError, match="with strategy=oversample, but now strategy=square_root"):
        make(strategy="square_root").load_state_dict(state)


def test_another_order_within_is_refused_in_mid_epoch():
    def make(within=True, **options):
        lengths = np.arange(100) % 9 + 1
        inner = LengthBucketSampler(lengths, max_tokens=60, **options) if within else None
        return TricksDataLoader(torch.arange(100), sampler=ClassBalancedSampler(LABELS, within=inner))

    one = make()
    next(iter(one))
    make().load_state_dict(one.state_dict())
    with pytest.raises(MisconfigurationError, match="with seed of `within`=0, but now seed of `within`=9"):
        make(seed=9).load_state_dict(one.state_dict())
    with pytest.raises(MisconfigurationError, match="with window=100, but now window=None"):
        make(within=False).load_state_dict(one.state_dict())


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_loss_that_balances_as_well_is_told(tmp_path):
    class Both(ClassWeightedLossMixin, L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 3)
            self.weigh_classes([70, 25, 5])

        def training_step(self, batch):
            return self.class_weighted_loss(self.layer(batch[:, None].float()), torch.zeros(len(batch)).long())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-4)

    loader = TricksDataLoader(torch.arange(100), sampler=ClassBalancedSampler(LABELS))
    with pytest.warns(DegradedWarning, match="ClassBalancedSampler"):
        quiet_trainer(tmp_path, max_epochs=1).fit(Both(), loader)
    by_its_loss = Both()
    by_its_loss.weigh_classes([70, 25, 5], EffectiveNumber(0.0), loss=LogitAdjusted())
    with pytest.warns(DegradedWarning, match="ClassBalancedSampler"):
        quiet_trainer(tmp_path, max_epochs=1).fit(by_its_loss, loader)
    even = Both()
    even.weigh_classes([70, 25, 5], EffectiveNumber(0.0))
    quiet_trainer(tmp_path, max_epochs=1).fit(even, loader)


def test_dropped_samples_are_not_drawn():
    lengths = np.where(np.arange(100) % 7 == 0, 50, 3)
    within = LengthBucketSampler(lengths, max_tokens=20, too_long="drop")
    sampler = ClassBalancedSampler(LABELS, within=within)
    assert (np.unique(sampler.draw(0)) % 7 > 0).all()
    assert len(set(sampler.drawn.tolist())) == 1


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([0, 2], {}, DataError, "Class 1 has no sample to draw"),
        ([0, 1], {"classes": 4}, DataError, "Class 2 has no sample to draw, nor have 1 more"),
        ([0, 3, 4], {"classes": 3}, DataError, "Sample 1 has label 3, and 1 more are out of range"),
        ([0, -1], {}, DataError, "Sample 1 has label -1"),
        ([0.5], {}, DataError, "must be a sequence of whole numbers"),
        ([0, 1], {"strategy": "most"}, MisconfigurationError, "`strategy` must be one of oversample"),
        ([0, 1], {"strategy": [0.0, 0.0]}, MisconfigurationError, "a finite weight of at least 0"),
        ([0, 1], {"strategy": [1, -1]}, MisconfigurationError, "a finite weight of at least 0"),
        ([0, 1], {"strategy": [1]}, DataError, "Sample 1 has label 1"),
        ([0, 1], {"batch_size": 0}, MisconfigurationError, "`batch_size` must be"),
    ],
)
def test_bad_input(labels, options, error, message):
    with pytest.raises(error, match=message):
        ClassBalancedSampler(labels, **options)


def test_bad_sizes():
    with pytest.raises(DataError, match="There are 2 labels, but `within` has 1 lengths"):
        ClassBalancedSampler([0, 1], within=LengthBucketSampler([3]))
    with pytest.raises(MisconfigurationError, match="`batch_size=3` or `within`"):
        ClassBalancedSampler([0, 1], batch_size=3, within=LengthBucketSampler([3, 1]))
    with pytest.raises(DataError, match="There are 2 labels, but 3 samples"):
        TricksDataLoader(range(3), sampler=ClassBalancedSampler([0, 1]))
