"""CheckpointEnsemble and running statistics: those of torch's `update_bn` for the averaged weights."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_tricks.callbacks import CheckpointEnsemble, GreedySoup, LastK, TopK
from lightning_tricks.errors import MisconfigurationError

STATISTICS = ["layer.1.running_mean", "layer.1.running_var"]


@pytest.fixture
def normed(scripted):
    class Normed(scripted):
        """A deep enough network that its statistics move with its weights."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.Linear(3, 1))

        def training_step(self, batch, _):
            loss = self.loss(batch)
            self.log("train/loss", loss)
            return loss

    return Normed


def mean_of(members):
    return {name: torch.stack([m[name].double() for m in members]).mean(0).to(members[-1][name]) for name in members[0]}


def with_torchs_statistics(normed, weights):
    """A module of these weights whose statistics torch computed over the training data."""
    module = normed()
    module.load_state_dict(weights)
    update_bn([x for x, _ in module.train_dataloader()], module.layer)
    return module.eval()


def loss_of(module):
    batches = list(module.val_dataloader())
    return torch.stack([module.loss(batch) for batch in batches]).mean().item()


def test_an_average_has_statistics_of_its_own(trainer, normed, diary, same_weights):
    callback, module = CheckpointEnsemble(LastK(2)), normed()
    trainer([callback, diary], max_epochs=4).fit(module)
    found, mean = (
        torch.load(callback.path, weights_only=True)["state_dict"],
        mean_of([diary.weights[2], diary.weights[3]]),
    )
    expected = with_torchs_statistics(normed, mean)
    for name, value in expected.state_dict().items():
        assert torch.allclose(found[name].float(), value.float(), rtol=1e-5, atol=1e-6), name
    assert not any(torch.allclose(found[name], mean[name], rtol=1e-3) for name in STATISTICS), "a mean of statistics"
    assert found["layer.1.num_batches_tracked"].dtype == torch.int64
    assert callback.results["ensemble"]["val/loss"] == pytest.approx(loss_of(expected), rel=1e-4)
    assert same_weights(module.state_dict(), diary.weights[3]), "the fit's own weights or statistics have changed"


def test_a_greedy_soup_is_scored_with_them(trainer, normed):
    callback = CheckpointEnsemble(LastK(4), GreedySoup(monitor="val/loss"))
    trainer([callback], max_epochs=4).fit(normed())
    content = torch.load(callback.path, weights_only=True)
    assert len(content["lightning_tricks"]["ensemble"]) > 1, "one member: nothing was averaged"
    module = normed()
    module.load_state_dict(content["state_dict"])
    assert callback.results["ensemble"]["val/loss"] == pytest.approx(loss_of(module.eval()), rel=1e-5)
    expected = with_torchs_statistics(normed, content["state_dict"]).state_dict()
    for name in STATISTICS:
        assert torch.allclose(content["state_dict"][name], expected[name], rtol=1e-5, atol=1e-6), name


def test_a_single_member_keeps_its_own(trainer, normed, diary, same_weights):
    callback = CheckpointEnsemble(TopK(1, monitor="val/score", mode="min"))
    trainer([callback, diary], max_epochs=3).fit(normed([2.0, 1.0, 3.0]))
    assert same_weights(torch.load(callback.path, weights_only=True)["state_dict"], diary.weights[1])


def test_a_resumed_fit_without_a_step_left(trainer, normed, tmp_path):
    first, again = CheckpointEnsemble(LastK(2)), CheckpointEnsemble(LastK(2))
    fitted = trainer([first], max_epochs=3)
    fitted.fit(normed())
    path = tmp_path / "end.ckpt"
    fitted.save_checkpoint(path)
    wanted = torch.load(first.path, weights_only=True)["state_dict"]
    first.path.unlink()
    trainer([again], max_epochs=3).fit(normed(), ckpt_path=path)
    found = torch.load(again.path, weights_only=True)["state_dict"]
    assert all(torch.allclose(found[name].float(), wanted[name].float(), rtol=1e-5) for name in wanted)


def test_two_fits_estimate_twice(trainer, normed):
    callback = CheckpointEnsemble(LastK(2))
    for data in (1.0, 3.0):
        module = normed()
        loader = DataLoader([(data * x, y) for x, y in module.train_dataloader().dataset], batch_size=4)
        trainer([callback], max_epochs=2).fit(module, loader, module.val_dataloader())
        found = torch.load(callback.path, weights_only=True)["state_dict"]
        module.load_state_dict(found)
        update_bn([x for x, _ in loader], module.layer)
        for name in STATISTICS:
            assert torch.allclose(found[name], module.state_dict()[name], rtol=1e-5, atol=1e-6), name


def test_a_count_that_is_none():
    with pytest.raises(MisconfigurationError, match=r"CheckpointEnsemble's `statistics_batches` must .*got -1"):
        CheckpointEnsemble(statistics_batches=-1)
