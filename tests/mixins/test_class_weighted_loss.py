"""ClassWeightedLossMixin on one process; ranks are in the conformance matrix and test_engines.py."""

import copy

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional import balanced_weights
from lightning_tricks.mixins import Balanced, ClassWeightedLossMixin
from tests.mixins.models import QUIET, trainer

pytestmark = QUIET

COUNTS = [50, 30, 20]


class Model(ClassWeightedLossMixin, L.LightningModule):
    def __init__(self, counts=COUNTS):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)
        if counts is not None:
            self.weigh_classes(counts)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.class_weighted_loss(self.net(x), y)
        torch.testing.assert_close(
            loss, F.cross_entropy(self.net(x).float(), y, weight=balanced_weights(COUNTS)), rtol=1e-6, atol=1e-6
        )
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
        return torch.utils.data.DataLoader(data, batch_size=4)


@pytest.mark.parametrize("extra", [(), (5,)])
@pytest.mark.parametrize("ignored", [False, True])
def test_without_a_trainer_it_is_torchs(extra, ignored):
    logits, targets = torch.randn(6, 3, *extra, requires_grad=True), torch.randint(0, 3, (6, *extra))
    if ignored:
        targets[0] = -1
    loss = Model().class_weighted_loss(logits, targets, ignore_index=-1)
    expected = F.cross_entropy(logits, targets, weight=balanced_weights(COUNTS), ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.filterwarnings("ignore:Not as on one device:lightning_tricks.errors.DegradedWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_on_one_device_it_is_torchs(precision):
    trainer(precision=precision).fit(Model())


def test_without_a_valid_target_it_is_zero_with_a_gradient():
    logits = torch.randn(3, 3, requires_grad=True)
    loss = Model().class_weighted_loss(logits, torch.full((3,), -100))
    loss.backward()
    assert loss == 0
    torch.testing.assert_close(logits.grad, torch.zeros(3, 3))


def test_weights_are_a_saved_buffer_and_stay_fp32():
    model = Model()
    torch.testing.assert_close(model.state_dict()["class_weights"], Balanced().weights(COUNTS), rtol=0, atol=0)
    for cast in (model.bfloat16, model.half, model.double):
        cast()
        torch.testing.assert_close(model.class_weights, Balanced().weights(COUNTS), rtol=0, atol=0)
    assert model.net.weight.dtype == torch.float64
    assert model.to("meta").class_weights.is_meta


def test_loads_and_copies():
    model, other = Model(), Model([1, 1, 1])
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model)):
        torch.testing.assert_close(same.class_weights, model.class_weights, rtol=0, atol=0)


def test_counts_may_be_set_again():
    model = Model()
    model.weigh_classes([1, 1, 1])
    torch.testing.assert_close(model.class_weights, torch.ones(3))


@pytest.mark.parametrize("counts", [[60, 0, 40], torch.tensor([60, 0, 40])])
def test_an_absent_class_warns_and_stays_finite(counts):
    with pytest.warns(UserWarning, match="No training example of class 1: "):
        model = Model(counts)
    assert torch.isfinite(model.class_weighted_loss(torch.randn(2, 3), torch.tensor([1, 1])))


def test_without_weights_the_remedy_is_named():
    with pytest.raises(
        MisconfigurationError, match=r"Model has no class weights: call `self\.weigh_classes\(counts\)`"
    ):
        Model(counts=None).class_weighted_loss(torch.randn(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (
            torch.zeros(2, 4),
            torch.zeros(2, dtype=torch.int64),
            r"`logits` must be floating, of shape \(N, 3, ...\).*\(2, 4\)",
        ),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "`logits` must be floating"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"`targets` must be torch.int64.*\(2,\), got.*\(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2), r"got torch.float32 of shape \(2,\)"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 1, dtype=torch.int64), r"\(2, 5\), got"),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(logits, targets, message):
    with pytest.raises(MisconfigurationError, match=message):
        Model().class_weighted_loss(logits, targets)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_target_that_is_no_class_is_refused(wrong):
    with pytest.raises(DataError, match=f"sample 1 of the batch has the target {wrong}, which is no class: "):
        Model().class_weighted_loss(torch.zeros(2, 3), torch.tensor([0, wrong]))
    with pytest.raises(DataError, match=rf"sample 0 of the batch, at 4, has the target {wrong}, which"):
        Model().class_weighted_loss(torch.zeros(1, 3, 5), torch.tensor([[0, -100, 1, 2, wrong]]))
