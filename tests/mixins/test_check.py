"""What the check says of mixins: class weights beside a sampler that balances, and accumulation; LoRA everywhere."""

import importlib.util

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import lightning_tricks
from lightning_tricks.engines import Trick
from lightning_tricks.errors import DegradedWarning
from lightning_tricks.mixins import ClassWeightedLossMixin
from tests.mixins.models import Classifier, trainer

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")


class Weighted(ClassWeightedLossMixin, L.LightningModule):
    def __init__(self, sampler=None, counts=(6, 2)):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.sampler = sampler
        self.steps = 0
        if counts:
            self.weigh_classes(counts)

    def training_step(self, batch, _):
        self.steps += 1
        return self.class_weighted_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        labels = torch.tensor([0, 0, 0, 1, 0, 0, 1, 0])
        return DataLoader(TensorDataset(torch.ones(8, 2), labels), batch_size=4, sampler=self.sampler)


def balancing():
    return WeightedRandomSampler([1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 3.0, 1.0], num_samples=8)


class OwnSampler(torch.utils.data.SequentialSampler):
    trick = Trick(jobs=("balance classes",))


@pytest.mark.parametrize("sampler", [balancing, lambda: OwnSampler(range(8))], ids=["torch", "declared"])
def test_sampler_and_loss_that_both_balance_warn_before_the_first_step(sampler):
    module = Weighted(sampler())

    class Notes(L.Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("the warning comes first")

    name = type(module.sampler).__name__
    words = f"ClassWeightedLossMixin and {name} both balance the classes: rare ones count twice over: keep one"
    with pytest.raises(DegradedWarning, match=words):  # an error in tests
        trainer(callbacks=[Notes()]).fit(module)
    assert module.steps == 0


def test_a_sampler_that_lightning_wraps_is_recognised():
    with pytest.raises(DegradedWarning, match="both balance the classes"):
        trainer(strategy="ddp").fit(Weighted(balancing()))


@pytest.mark.parametrize("counts", [(6, 2), (4, 4)], ids=["weights", "equal weights"])
def test_one_that_balances_is_exact(counts):
    plain = Weighted(counts=counts)
    trainer().fit(plain)
    other = Weighted(balancing(), counts=(4, 4))
    trainer().fit(other)
    assert plain.steps == other.steps == 3


def test_the_sampler_is_told_to_be_unknown_before_the_data_are_there():
    found = {found.trick: found for found in lightning_tricks.check(trainer(), Weighted(balancing()))}
    assert found["ClassWeightedLossMixin"].verdict == "exact"
    assert found["ClassWeightedLossMixin"].reason == (
        "a sampler that balances the classes too is told once the data are set up"
    )


def test_weights_under_accumulation_are_exact():
    assert lightning_tricks.check(trainer(accumulate_grad_batches=2), Weighted()).verdict == "exact"


@pytest.mark.parametrize(
    "strategy", ["auto", "ddp", "fsdp2", *(pytest.param(f"zero_{s}", marks=needs_deepspeed) for s in (1, 2, 3))]
)
def test_lora_is_exact_on_every_engine(strategy):
    report = lightning_tricks.check(trainer(strategy=strategy), Classifier())
    assert [(found.trick, found.verdict) for found in report] == [
        ("LoRAMixin", "exact"),
        ("precision '32-true'", "exact"),
    ]


def test_a_mixin_that_is_not_used_has_no_line():
    names = [found.trick for found in lightning_tricks.check(trainer(), Weighted(counts=None))]
    assert names == ["precision '32-true'"]
