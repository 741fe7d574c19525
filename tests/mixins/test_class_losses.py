"""ClassWeightedLossMixin with other weights and losses than its own, with labels, and what it reports."""

import json
import logging

import lightning as L
import pytest
import torch
from torch.nn import functional as F

import lightning_tricks
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.mixins import (
    Balanced,
    ClassWeightedLossMixin,
    CrossEntropy,
    EffectiveNumber,
    ExplicitWeights,
    Focal,
    InverseSquareRoot,
    LogitAdjusted,
)
from tests.mixins.models import QUIET, trainer

pytestmark = QUIET

COUNTS = [50, 30, 20]


class Model(ClassWeightedLossMixin, L.LightningModule):
    def __init__(self, counts=COUNTS, *arguments, classes=3, **options):
        super().__init__()
        self.net = torch.nn.Linear(4, classes)
        self.weigh_classes(counts, *arguments, **options)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.class_weighted_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", self.class_weighted_loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Balanced(), [2 / 3, 10 / 9, 5 / 3]),
        (EffectiveNumber(0.0), [1.0, 1.0, 1.0]),
        (InverseSquareRoot(), [0.7747, 1.0001, 1.2249]),  # 3 n^-1/2 / sum
        (ExplicitWeights([1.0, 2.0, 8.0]), [1.0, 2.0, 8.0]),
        (ExplicitWeights(torch.tensor([3, 2, 1])), [3.0, 2.0, 1.0]),
    ],
)
def test_policies(policy, expected):
    torch.testing.assert_close(Model(COUNTS, policy).class_weights, torch.tensor(expected), rtol=1e-3, atol=0)


def test_a_policy_of_ones_own():
    class Doubling:
        def weights(self, counts):
            return torch.tensor([1.0, 2.0, 4.0])

    assert Model(COUNTS, Doubling()).class_weights.tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, -2.0, 4.0], "must be finite and above 0"),
        ([1.0, float("nan"), 4.0], "must be finite and above 0"),
        ([1.0, 2.0], "one for each of the 3 classes"),
        (None, "must be numbers"),
    ],
)
def test_what_a_policy_of_ones_own_gives_is_checked(values, words):
    class Wrong:
        def weights(self, counts):
            return None if values is None else torch.tensor(values)

    with pytest.raises(MisconfigurationError, match=f"Wrong.weights gave what are no weights: .*{words}"):
        Model(COUNTS, Wrong())


@pytest.mark.parametrize("counts", [[0, 100, 0], torch.tensor([0, 100, 0])])
def test_examples_all_of_one_class_are_refused(counts):
    with pytest.raises(DataError, match="all 100 training examples are of class 1: there is nothing to tell apart"):
        Model(counts)


def test_weights_from_a_file(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps([1, 2.5, 4]))
    assert Model(COUNTS, ExplicitWeights(path)).class_weights.tolist() == [1.0, 2.5, 4.0]
    path.write_text("{}")
    with pytest.raises(DataError, match=r"weights\.json holds dict and not a list"):
        ExplicitWeights(path).weights(COUNTS)
    pairs = [[1.0, 9.0], [1.0, 2.0], [1.0, 0.5]]
    path.write_text(json.dumps(pairs))
    of_labels = [[90, 10], [66, 33], [50, 50]]
    assert Model(of_labels, ExplicitWeights(path)).class_weights.tolist() == pairs
    assert Model(of_labels, ExplicitWeights(torch.tensor(pairs))).class_weights.tolist() == pairs
    assert Model(of_labels, ExplicitWeights([1, 3])).class_weights.tolist() == [[1.0, 3.0]] * 3
    with pytest.raises(MisconfigurationError, match="a pair for each of the 2 labels"):
        Model(of_labels[:2], ExplicitWeights(path))
    with pytest.raises(MisconfigurationError, match="must be finite and above 0"):
        Model(of_labels[:2], ExplicitWeights([[1, 2], [1, -2]]))
    with pytest.raises(DataError, match=r"cannot be read from .*absent\.json"):
        ExplicitWeights(tmp_path / "absent.json").weights(COUNTS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Focal(-1.0), "`gamma` must be finite and 0 or more, got -1"),
        (lambda: Focal(float("nan")), "`gamma` must be"),
        (lambda: LogitAdjusted(-0.5), "`tau` must be"),
        (lambda: CrossEntropy(label_smoothing=1.0), "`label_smoothing` must be 0 or more and below 1"),
        (lambda: EffectiveNumber(1.0), "`beta` must be 0 or more and below 1"),
        (lambda: Model(COUNTS, ExplicitWeights([1.0, 2.0])), "one for each of the 3 classes"),
        (lambda: Model([[1, 2], [3]]), "`counts`"),
        (lambda: Model([[1, 2, 3], [3, 4, 5]]), r"`counts` of labels must be of shape \(K, 2\), .* got \(2, 3\)"),
    ],
)
def test_bad_options_are_refused(make, words):
    with pytest.raises(MisconfigurationError, match=words):
        make()


def test_losses_are_those_of_their_policies():
    logits, targets = torch.randn(6, 3, 5), torch.randint(0, 3, (6, 5))
    weights, smoothed = Balanced().weights(COUNTS), CrossEntropy(label_smoothing=0.2)
    torch.testing.assert_close(
        Model(COUNTS, loss=smoothed).class_weighted_loss(logits, targets),
        F.cross_entropy(logits, targets, weight=weights, label_smoothing=0.2),
    )
    p = logits.softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    focal = (weights[targets] * (1 - p) ** 2 * -p.log()).sum() / weights[targets].sum()
    torch.testing.assert_close(Model(COUNTS, loss=Focal(2.0)).class_weighted_loss(logits, targets), focal)
    shifted = logits + (torch.tensor(COUNTS) / 100).log().view(1, 3, 1)
    adjusted = Model(COUNTS, EffectiveNumber(0.0), loss=LogitAdjusted(1.0))
    torch.testing.assert_close(adjusted.class_weighted_loss(logits, targets), F.cross_entropy(shifted, targets))


def test_logits_are_adjusted_in_the_loss_only():
    model = Model(COUNTS, loss=LogitAdjusted(1.0))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 2, 0])
    prior = (torch.tensor(COUNTS) / 100).log()
    plain, adjusted = F.cross_entropy(model.net(x), y), F.cross_entropy(model.net(x) + prior, y)
    assert (plain - adjusted).abs() > 0.01
    torch.testing.assert_close(model.train().class_weighted_loss(model(x), y), adjusted)
    torch.testing.assert_close(model.eval().class_weighted_loss(model(x), y), plain)


@pytest.mark.parametrize("counts", [COUNTS, [[90, 10], [50, 50], [20, 80]]])
def test_in_a_fit_validation_is_on_plain_logits(counts):
    """Trap H5: what validation logs is the loss of the scores by which classes are decided."""
    model = Model(counts, loss=LogitAdjusted(1.0))
    y = torch.tensor([0, 1, 2, 2, 0, 1, 0, 0])
    if isinstance(counts[0], list):
        y = F.one_hot(y, 3)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4), y), batch_size=8)
    fit = trainer(max_steps=1, limit_train_batches=1)
    fit.fit(model, data, data)
    x, logits = data.dataset.tensors[0], model(data.dataset.tensors[0])
    expected = F.cross_entropy(logits, y) if y.ndim == 1 else F.binary_cross_entropy_with_logits(logits, y.float())
    assert len(x) == 8
    torch.testing.assert_close(fit.callback_metrics["val/loss"], expected.detach())


def test_the_prior_is_no_second_weighting():
    """Trap H4: what corrects by itself gets equal weights, and is told of where others are asked for."""
    assert Model(COUNTS, loss=LogitAdjusted()).class_weights.tolist() == [1.0, 1.0, 1.0]
    assert labelled_plainly(loss=LogitAdjusted()).class_weights.tolist() == [[1.0, 1.0]] * 4
    with pytest.warns(UserWarning, match=r"LogitAdjusted\(tau=1.0\) corrects the imbalance by itself, and Balanced"):
        Model(COUNTS, Balanced(), loss=LogitAdjusted())
    Model(COUNTS, Balanced(), loss=LogitAdjusted(0.0))

    class Own(CrossEntropy):
        balances = True

    assert Model(COUNTS, loss=Own()).class_weights.tolist() == [1.0, 1.0, 1.0]


def test_equal_weights_need_what_others_need_of_the_engine():
    """A mean over ranks and windows is exact, or refused, whatever the weights."""
    for policy in (Balanced(), EffectiveNumber(0.0)):
        report = lightning_tricks.check(trainer(), Model(COUNTS, policy))
        assert "ClassWeightedLossMixin" in [finding.trick for finding in report.findings]


def labelled_plainly(**options):
    return Model([[90, 10], [50, 50], [1, 99], [20, 80]], classes=4, **options)


def labelled(**options):
    return Model([[90, 10], [50, 50], [0, 100], [20, 80]], classes=4, **options)


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(0.1), Focal(2.0), LogitAdjusted(1.0)])
def test_one_logit_for_two_classes(loss):
    """The binary form: the score of class 1, as that of two classes whose first has the score 0."""
    model, logits, targets = (
        Model([90, 10], loss=loss, classes=2),
        torch.randn(7),
        torch.tensor([0, 1, 1, 0, -100, 0, 1]),
    )
    found = model.class_weighted_loss(logits, targets)
    torch.testing.assert_close(found, model.class_weighted_loss(torch.stack([torch.zeros(7), logits], dim=1), targets))
    if loss == CrossEntropy():
        kept, weights = targets >= 0, model.class_weights[targets.clamp_min(0)]
        wanted = F.binary_cross_entropy_with_logits(logits, targets.clamp_min(0).float(), weights, reduction="none")
        torch.testing.assert_close(found, wanted[kept].sum() / weights[kept].sum())
    model.eval().class_weighted_loss(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1, 1, 0]))
    model._class_recalls.close(2, lambda numbers: numbers, model.device, keep=True)
    assert [row.after for row in model.class_report()] == [0.0, 0.5]
    with pytest.raises(MisconfigurationError, match=r"of shape \(N, 2, ...\) or \(N,\), since"):
        model.class_weighted_loss(torch.zeros(3, 3), targets[:3])
    with pytest.raises(MisconfigurationError, match=r"of shape \(N, 3, ...\), since"):
        Model(COUNTS).class_weighted_loss(logits, targets)


@pytest.mark.filterwarnings("ignore:No training example")
def test_labels_that_may_hold_together():
    model = labelled()
    assert model.class_weights.shape == (4, 2)
    torch.testing.assert_close(model.class_weights[0], Balanced().weights([90, 10]))
    logits, targets = torch.randn(6, 4), torch.randint(0, 2, (6, 4))
    weights = model.class_weights[torch.arange(4), targets]
    expected = F.binary_cross_entropy_with_logits(logits, targets.float(), weight=weights, reduction="sum")
    torch.testing.assert_close(model.class_weighted_loss(logits, targets), expected / weights.sum())
    ignored = targets.clone()
    ignored[0, 0] = -100
    assert model.class_weighted_loss(logits, ignored) != model.class_weighted_loss(logits, targets)
    with pytest.raises(MisconfigurationError, match=r"must be 0 or 1, torch.int64, of shape \(6, 4\)"):
        model.class_weighted_loss(logits, targets.float())
    with pytest.raises(MisconfigurationError, match=r"of shape \(N, 4\), since `weigh_classes` got counts of 4 labels"):
        model.class_weighted_loss(logits[:, :3], targets)
    with pytest.raises(DataError, match=r"sample 0 of the batch, at [0-3], has the target 2, which is no class"):
        model.class_weighted_loss(logits, targets + 1)
    with pytest.raises(MisconfigurationError, match="label smoothing is for classes"):
        labelled(loss=CrossEntropy(0.1)).class_weighted_loss(logits, targets)


def test_labels_without_an_example_are_named():
    with pytest.warns(UserWarning, match=r"No training example of class 2 \(no\): it gets the largest weight"):
        labelled()


def test_the_prior_follows_the_logits_and_stays_fp32():
    model = Model(COUNTS, loss=LogitAdjusted(1.0)).bfloat16()
    logits = torch.randn(3, 3).bfloat16()
    targets = torch.tensor([0, 1, 2])
    expected = Model(COUNTS, loss=LogitAdjusted(1.0)).class_weighted_loss(logits.float(), targets)
    torch.testing.assert_close(model.class_weighted_loss(logits, targets), expected)


# -- the report --------------------------------------------------------------------------------------------------------


def separable(samples, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (samples,), generator=generator)
    x = F.one_hot(y, 4).float() + 0.1 * torch.randn(samples, 4, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch_size)


def test_recalls_are_those_of_the_first_and_the_last_validation(caplog):
    torch.manual_seed(0)
    model, val = Model(), separable(40)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit = trainer(max_epochs=6, max_steps=-1)
        fit.fit(model, separable(60), val)
    rows = model.class_report()
    assert [(row.count, round(row.weight, 3)) for row in rows] == [(50, 0.667), (30, 1.111), (20, 1.667)]
    x, y = (torch.cat(part) for part in zip(*val, strict=True))
    found = model(x).argmax(1)
    assert [row.after for row in rows] == [
        ((found == y) & (y == k)).sum().item() / (y == k).sum().item() for k in range(3)
    ]
    assert sum(row.before for row in rows) < sum(row.after for row in rows)
    (told,) = [record.message for record in caplog.records if "class by class" in record.message]
    assert "Model, class by class:\nclass    count  weight  recall first  last\n    0       50    0.67" in told


def test_recalls_before_training_are_those_of_a_whole_sanity_check(caplog):
    model, val = Model(), separable(40)
    x, y = (torch.cat(part) for part in zip(*val, strict=True))
    found = model(x).argmax(1)
    expected = [((found == y) & (y == k)).sum().item() / (y == k).sum().item() for k in range(3)]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer(max_epochs=6, max_steps=-1, num_sanity_val_steps=-1).fit(model, separable(60), val)
    assert [row.before for row in model.class_report()] == expected
    assert [row.after for row in model.class_report()] != expected
    assert "class    count  weight  recall before after" in caplog.text
    partly = Model()
    partly.load_state_dict(model.state_dict())
    trainer(max_epochs=1, max_steps=-1, num_sanity_val_steps=2).fit(partly, separable(60), val)
    rows = partly.class_report()
    assert [row.before for row in rows] == [row.after for row in rows], "there was one whole validation"


def test_ignored_targets_and_labels_are_counted_as_they_are():
    model = Model().eval()
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0], [0, 0, 9.0]])
    model.class_weighted_loss(logits, torch.tensor([0, -100, 2, 2]))
    model._class_recalls.close(3, lambda numbers: numbers, model.device, keep=True)
    first, second, third = model.class_report()
    assert (first.after, third.after) == (1.0, 0.5)
    assert second.after != second.after  # none of its targets counts: not a number
    several = Model([[9, 1], [5, 5], [3, 7]]).eval()
    several.class_weighted_loss(
        torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    )
    several._class_recalls.close(3, lambda numbers: numbers, several.device, keep=True)
    assert [row.after for row in several.class_report()] == [1.0, 0.5, 0.0]


def test_a_resumed_run_keeps_the_first_recalls(tmp_path):
    torch.manual_seed(0)
    model, val = Model(), separable(40)
    fit = trainer(max_epochs=2, max_steps=-1)
    fit.fit(model, separable(60), val)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Model()
    trainer(max_epochs=6, max_steps=-1).fit(resumed, separable(60), val, ckpt_path=tmp_path / "last.ckpt")
    assert [row.before for row in resumed.class_report()] == [row.before for row in model.class_report()]


def test_a_module_that_validates_otherwise_has_no_report(caplog):
    class Other(Model):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self(batch[0]).mean())

    model = Other()
    trainer(max_epochs=1).fit(model, separable(16), separable(16))
    assert model.class_report() == []
    assert "class by class" not in caplog.text


@pytest.mark.parametrize("kept", [[[0.5], [1.0]], [[0.5], [1.0], True]])
def test_recalls_of_older_checkpoints_load(kept):
    recalls = Model()._class_recalls
    recalls.load(kept)
    assert (recalls.first, recalls.last, recalls.untrained) == ([0.5], [1.0], len(kept) == 3)
