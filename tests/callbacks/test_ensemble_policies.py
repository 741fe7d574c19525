"""Which checkpoints an ensemble takes, and what it makes of them."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tricks.callbacks import (
    CheckpointEnsemble,
    Cosine,
    Cyclic,
    Every,
    GreedySoup,
    LastK,
    LearningRateSchedule,
    NonFiniteGuard,
    Predictions,
    TopK,
    Weighted,
)
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.inference import PredictionEnsemble
from lightning_tricks.storage import WeightsFile

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
]

SCORES = [3.0, 1.0, math.nan, 2.0, 1.5, 9.0]
TOP = TopK(3, monitor="val/score", mode="min")


def weighted(diary, epochs, shares):
    members = [diary.weights[epoch] for epoch in epochs]
    total = {n: sum(s * m[n].double() for m, s in zip(members, shares, strict=True)) for n in members[0]}
    return {name: (value / sum(shares)).float() for name, value in total.items()}


def ensemble_in(callback):
    return torch.load(callback.path, weights_only=True)["state_dict"]


def close(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("members", "epochs"),
    [(LastK(3), [3, 4, 5]), (LastK(9), [0, 1, 2, 3, 4, 5]), (Every(epochs=2), [1, 3, 5]), (Every(2, k=2), [3, 5])],
)
def test_members_by_epoch(trainer, scripted, diary, members, epochs):
    callback = CheckpointEnsemble(members)
    trainer([callback, diary]).fit(scripted())
    close(ensemble_in(callback), weighted(diary, epochs, [1.0] * len(epochs)))
    file = torch.load(callback.path, weights_only=True)
    assert [member["epoch"] for member in file["lightning_tricks"]["ensemble"]] == epochs
    assert callback.scores == []
    assert set(callback.results) == {"ensemble"}
    assert math.isfinite(callback.results["ensemble"]["val/loss"])


def test_no_validation_is_needed(trainer, scripted):
    class Unvalidated(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = scripted()

        def training_step(self, batch, index):
            return self.inner.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return self.inner.train_dataloader()

    callback = CheckpointEnsemble(LastK(2))
    trainer([callback], max_epochs=3).fit(Unvalidated())
    assert len(torch.load(callback.path, weights_only=True)["lightning_tricks"]["ensemble"]) == 2
    assert callback.results == {}
    with pytest.raises(MisconfigurationError, match="monitors `val/loss` after each validation, but this fit has none"):
        trainer([CheckpointEnsemble(LastK(2), GreedySoup())]).fit(Unvalidated())


def test_an_old_member_goes_when_the_new_one_is_complete(trainer, scripted, tmp_path, monkeypatch):
    callback, seen = CheckpointEnsemble(LastK(2), dirpath=tmp_path / "out"), []
    trainer_ = trainer([callback])

    def members():
        return {path.name for path in (tmp_path / "out").glob("member-*")}

    original = callback._scored

    def watched(*arguments):
        write = callback.engine.save_weights

        def spied(path, *rest):
            before = members()
            write(path, *rest)
            seen.append((before, members()))

        monkeypatch.setattr(callback.engine, "save_weights", spied)
        original(*arguments)
        monkeypatch.setattr(callback.engine, "save_weights", write)

    monkeypatch.setattr(callback, "_scored", watched)
    trainer_.fit(scripted())
    assert len(seen) == 6
    assert all(len(before) <= 2 and before < after for before, after in seen)
    assert len(members()) == 2


@pytest.mark.parametrize(
    ("members", "epochs", "shares"),
    [(TOP, [1, 4, 3], (5.0, 2.0, 1.0)), (LastK(3), [5, 4, 3], (5.0, 2.0, 1.0)), (LastK(4), [5, 4], (3.0, 1.0))],
)
def test_weighted_by_rank_or_age(trainer, scripted, diary, members, epochs, shares):
    callback = CheckpointEnsemble(members, Weighted(shares))
    trainer([callback, diary]).fit(scripted(SCORES))
    close(ensemble_in(callback), weighted(diary, epochs, shares))


def test_fewer_members_than_shares(trainer, scripted, diary):
    callback = CheckpointEnsemble(LastK(5), Weighted((5, 2, 1, 7)))
    trainer([callback, diary], max_epochs=2).fit(scripted())
    close(ensemble_in(callback), weighted(diary, [1, 0], [5.0, 2.0]))


# -- greedy soup -------------------------------------------------------------------------------------------------------


def loss_of(scripted, weights):
    module = scripted()
    module.load_state_dict(weights)
    with torch.no_grad():
        return sum(module.loss(batch).item() for batch in module.val_dataloader()) / 2


def recipe(scripted, diary, epochs):
    """The paper's, on the weights that the diary noted."""
    order = sorted(epochs, key=lambda epoch: loss_of(scripted, diary.weights[epoch]))
    chosen, best = order[:1], loss_of(scripted, diary.weights[order[0]])
    for epoch in order[1:]:
        tried = loss_of(scripted, weighted(diary, [*chosen, epoch], [1.0] * (len(chosen) + 1)))
        if tried <= best:
            chosen, best = [*chosen, epoch], tried
    return chosen, best


@pytest.mark.parametrize("lr", [0.3, 1.5])
@pytest.mark.parametrize("members", [LastK(6), TopK(6, monitor="val/loss")])
def test_the_greedy_soup_is_the_papers(trainer, scripted, diary, same_weights, members, lr):
    callback, module = CheckpointEnsemble(members, GreedySoup("val/loss")), scripted(lr=lr)
    trainer([callback, diary]).fit(module)
    chosen, best = recipe(scripted, diary, range(6))
    file = torch.load(callback.path, weights_only=True)
    assert sorted(member["epoch"] for member in file["lightning_tricks"]["ensemble"]) == sorted(chosen)
    close(file["state_dict"], weighted(diary, chosen, [1.0] * len(chosen)))
    assert callback.results["ensemble"]["val/loss"] == pytest.approx(best, rel=1e-5)
    assert callback.results["best"]["val/loss"] == pytest.approx(loss_of(scripted, diary.weights[chosen[0]]), rel=1e-5)
    assert callback.results["ensemble"]["val/loss"] <= callback.results["best"]["val/loss"]
    assert len(callback.rejected) == 6 - len(chosen)
    assert same_weights(module.state_dict(), diary.weights[5])


def test_a_soup_without_a_finite_score(trainer, scripted):
    callback = CheckpointEnsemble(LastK(3), GreedySoup("val/score", mode="max"))
    with pytest.warns(UserWarning, match="no member has a finite `val/score`"):
        trainer([callback], max_epochs=2).fit(scripted([math.nan]))
    assert callback.path is None


def test_two_metrics_are_refused():
    with pytest.raises(MisconfigurationError, match="the same `monitor` and `mode`"):
        CheckpointEnsemble(TOP, GreedySoup("val/loss"))


# -- predictions -------------------------------------------------------------------------------------------------------


def test_predictions_are_checkpoints_for_an_ensemble(trainer, scripted, diary, same_weights):
    callback = CheckpointEnsemble(TOP, Predictions())
    trainer([callback, diary]).fit(scripted(SCORES, lr=0.05))
    assert callback.path is None
    found = [scripted.load_from_checkpoint(path, strict=True) for path in callback.paths]
    assert all(same_weights(m.state_dict(), diary.weights[e]) for m, e in zip(found, [1, 4, 3], strict=True))
    assert found[0].hparams.lr == 0.05
    ensemble = PredictionEnsemble(
        callback.paths, scripted, mean=callback.combine.mean, forward=lambda module, x: module.layer(x).expand(-1, 2)
    )
    assert ensemble(torch.ones(3, 2)).shape == (3, 2)


def test_predictions_may_have_running_statistics(trainer, scripted):
    module = scripted()
    module.norm = torch.nn.BatchNorm1d(2)
    callback = CheckpointEnsemble(LastK(2), Predictions())
    trainer([callback], max_epochs=2).fit(module)
    assert len(callback.paths) == 2


# -- given checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def given(trainer, scripted, tmp_path):
    paths = []
    for seed in range(3):
        module = scripted()
        with torch.no_grad():
            module.layer.weight.fill_(float(seed))
        run = trainer([], max_epochs=1)
        run.strategy.connect(module)
        run.save_checkpoint(tmp_path / f"{seed}.ckpt")
        paths.append(tmp_path / f"{seed}.ckpt")
    return paths


@pytest.mark.parametrize("combine", [Weighted((1, 1, 1)), GreedySoup("val/loss")])
def test_given_checkpoints(trainer, scripted, diary, given, same_weights, combine):
    callback, module = CheckpointEnsemble(given, combine), scripted()
    before = [path.read_bytes() for path in given]
    trainer([callback, diary], max_epochs=1).fit(module)
    value = ensemble_in(callback)["layer.weight"]
    assert torch.equal(value, torch.full((1, 2), 1.0))  # their mean, and the best: the target is the sum of the inputs
    assert [path.read_bytes() for path in given] == before
    assert same_weights(module.state_dict(), diary.weights[0])


def test_given_checkpoints_are_checked_before_the_fit(trainer, scripted, given, tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.ones(1, 3), "layer.bias": torch.ones(1)}}, tmp_path / "odd.ckpt")
    torch.save({"state_dict": {"layer.lora_A": torch.ones(1, 3)}}, tmp_path / "adapter.ckpt")
    (tmp_path / "empty").mkdir()
    for members, message in [
        ([*given, tmp_path / "odd.ckpt"], r"odd\.ckpt.*`layer\.weight`"),
        ([tmp_path / "odd.ckpt"], r"odd\.ckpt is of another module: `layer\.weight` is of shape \[1, 3\]"),
        ([tmp_path / "none.ckpt"], r"no checkpoint .*none\.ckpt"),
        ([tmp_path / "empty"], "empty is a folder that neither"),
        ([tmp_path / "adapter.ckpt"], r"adapter\.ckpt holds adapters.*average_checkpoints"),
    ]:
        module = scripted()
        with pytest.raises(CheckpointError, match=message):
            trainer([CheckpointEnsemble(members)]).fit(module)
        assert module.global_step == 0


OTHERS = {
    "a second set": ({"model_ema": {}}, r"last\.ckpt holds two sets of weights, `state_dict` and `model_ema`"),
    "an average": ({"averaging_state": {}}, r"last\.ckpt holds a running average of the weights and .*0\.ckpt the"),
    "another base": (
        {"lightning_tricks": {"base": {"body": {"shape": "1", "float32": "00"}}}},
        r"last\.ckpt with .*0\.ckpt: they were trained beside different frozen weights `body`",
    ),
    "other labels": ({"hyper_parameters": {"labels": ["a", "b"]}}, r"the hyper-parameter `labels` is \['a', 'b'\]"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_given_checkpoints_of_another_kind_are_refused_before_the_fit(trainer, scripted, given, tmp_path, what):
    more, message = OTHERS[what]
    first = torch.load(given[0], weights_only=True)
    torch.save({**first, "hyper_parameters": {"labels": ["a", "c"]}}, given[0])
    torch.save({**first, **more}, tmp_path / "last.ckpt")
    module = scripted()
    with pytest.raises(CheckpointError, match=message):
        trainer([CheckpointEnsemble([*given, tmp_path / "last.ckpt"])]).fit(module)
    assert module.global_step == 0


def test_a_single_given_checkpoint_with_a_second_set_is_refused(trainer, scripted, given):
    torch.save({**torch.load(given[0], weights_only=True), "ema": {}}, given[0])
    with pytest.raises(CheckpointError, match="two sets of weights"):
        trainer([CheckpointEnsemble(given[:1])]).fit(scripted())


@pytest.mark.parametrize("members", [[], "one.ckpt", 3, [1, 2]])
def test_members_must_be_a_policy_or_paths(members):
    with pytest.raises(MisconfigurationError, match="`members` must say which checkpoints"):
        CheckpointEnsemble(members)


# -- cyclic ------------------------------------------------------------------------------------------------------------


class Rates:
    """Notes the learning rate of every optimizer step, and the weights after it."""

    def __init__(self, module):
        self.rates, self.weights = [], []
        optimizers = module.configure_optimizers
        module.configure_optimizers = lambda: self._watch(module, optimizers())

    def _watch(self, module, optimizer):
        def note(optimizer, *_):
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.weights.append({k: v.clone() for k, v in module.state_dict().items()})

        optimizer.register_step_post_hook(note)
        return optimizer


def test_cyclic_sets_the_rate_and_takes_the_end_of_each_cycle(trainer, scripted):
    callback, module = CheckpointEnsemble(Cyclic(cycles=3)), scripted(lr=0.1)
    noted = Rates(module)
    trainer([callback]).fit(module)  # 6 epochs of 2 steps
    expected = [0.05 * (math.cos(math.pi * ((t - 1) % 4) / 4) + 1) for t in range(1, 13)]
    assert noted.rates == pytest.approx(expected, abs=1e-12)
    members = [noted.weights[step] for step in (3, 7, 11)]
    mean = {name: sum(m[name].double() for m in members).div(3).float() for name in members[0]}
    close(ensemble_in(callback), mean)
    file = torch.load(callback.path, weights_only=True)
    assert [member["step"] for member in file["lightning_tricks"]["ensemble"]] == [4, 8, 12]


def test_cyclic_counts_steps_not_batches(trainer, scripted):
    callback, module = CheckpointEnsemble(Cyclic(cycles=2)), scripted(lr=0.1)
    noted = Rates(module)
    trainer([callback], accumulate_grad_batches=2, max_epochs=4).fit(module)
    assert noted.rates == pytest.approx([0.1, 0.05, 0.1, 0.05])


def test_cyclic_leaves_out_steps_that_were_dropped(trainer, scripted):
    class Poisoned(scripted):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * float("nan") if self.global_step == 1 else loss

    callback, module = CheckpointEnsemble(Cyclic(cycles=2)), Poisoned(lr=0.1)
    noted = Rates(module)
    trainer([callback, NonFiniteGuard()], max_epochs=4).fit(module)
    whole = [0.05 * (math.cos(math.pi * (step % 4) / 4) + 1) for step in range(8)]
    # The second step is dropped and its rate is taken by the third; the last cycle is one step short.
    assert noted.rates == pytest.approx([whole[0], whole[1], whole[1], *whole[2:7]])
    file = torch.load(callback.path, weights_only=True)
    assert [member["step"] for member in file["lightning_tricks"]["ensemble"]] == [5]


def test_cyclic_interrupted_and_resumed(trainer, scripted, crash_after_epoch, same_weights, tmp_path):
    whole = CheckpointEnsemble(Cyclic(cycles=3, floor=0.1), dirpath=tmp_path / "whole" / "out")
    reference = scripted()
    trainer([whole]).fit(reference)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_last=True)
    folder = tmp_path / "cut" / "out"
    cut = [CheckpointEnsemble(Cyclic(cycles=3, floor=0.1), dirpath=folder), crash_after_epoch(3), saver]
    with pytest.raises(KeyError, match="crash"):
        trainer(cut, enable_checkpointing=True).fit(scripted())
    callback, module = CheckpointEnsemble(Cyclic(cycles=3, floor=0.1), dirpath=folder), scripted()
    trainer([callback]).fit(module, ckpt_path=saver.last_model_path)
    assert same_weights(module.state_dict(), reference.state_dict())
    assert same_weights(ensemble_in(callback), ensemble_in(whole))


def test_cyclic_is_refused_beside_another_scheduler(trainer, scripted):
    class Scheduled(scripted):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(MisconfigurationError, match=r"Cyclic sets the learning rate itself, and so does.*StepLR"):
        trainer([CheckpointEnsemble(Cyclic())]).fit(Scheduled())
    trainer([CheckpointEnsemble(LastK())], max_epochs=1).fit(Scheduled())


@pytest.mark.parametrize("first", ["ensemble", "schedule"])
def test_cyclic_is_refused_beside_a_schedule_of_the_suite(trainer, scripted, first):
    both = [CheckpointEnsemble(Cyclic()), LearningRateSchedule(Cosine())]
    with pytest.raises(MisconfigurationError, match=r"set the learning rate|sets the learning rate itself"):
        trainer(both if first == "ensemble" else both[::-1]).fit(scripted())


def test_cyclic_is_refused_under_manual_optimisation(trainer, scripted):
    module = scripted()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationError, match="between steps that Lightning takes"):
        trainer([CheckpointEnsemble(Cyclic())]).fit(module)


@pytest.mark.parametrize(("epochs", "steps"), [(-1, "inf"), (2, "4")])
def test_cyclic_needs_to_know_the_steps(trainer, scripted, epochs, steps):
    class Stops(scripted):
        def training_step(self, batch, index):
            raise AssertionError("a step was taken")

    with pytest.raises(MisconfigurationError, match=f"into 5 cycles, and this one has {steps}"):
        trainer([CheckpointEnsemble(Cyclic())], max_epochs=epochs).fit(Stops())


# -- whatever goes wrong -----------------------------------------------------------------------------------------------

AVERAGING = """
import os, pathlib, signal, sys
import torch
import lightning_tricks.callbacks._combining as combining
from lightning.pytorch import LightningModule, Trainer
from lightning_tricks.callbacks import CheckpointEnsemble, LastK
from torch.utils.data import DataLoader

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may have Ctrl-C ignored

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, index):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def train_dataloader(self):
        return DataLoader(torch.ones(4, 2), batch_size=2)

average, signals = combining.average_stored, []
def dying(*arguments, **options):
    for path in pathlib.Path(sys.argv[1]).iterdir():
        (pathlib.Path(sys.argv[1]).parent / "before" / path.name).write_bytes(path.read_bytes())
    import lightning_tricks.engines._average as averaging
    mean = averaging._mean_of
    def second(*rest):
        signals.append(1)
        if len(signals) == 2:
            os.kill(os.getpid(), int(sys.argv[2]))
        return mean(*rest)
    averaging._mean_of = second
    average(*arguments, **options)
combining.average_stored = dying
Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[CheckpointEnsemble(LastK(3), dirpath=sys.argv[1])]).fit(Net())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_while_averaging_leaves_every_member_intact(tmp_path, how):
    folder, before = tmp_path / "out", tmp_path / "before"
    folder.mkdir()
    before.mkdir()
    (folder / "ensemble.ckpt").write_bytes(b"of the run before")
    command = [sys.executable, "-W", "ignore", "-c", AVERAGING, f"{folder}", f"{int(how)}"]
    run = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode != 0
    assert len(list(before.glob("member-*"))) == 3
    for path in before.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
        assert path.suffix != ".safetensors" or WeightsFile(path).tensor("layer.weight").isfinite().all()
    assert {path.name for path in folder.glob("[!.]*")} == {path.name for path in before.iterdir()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LastK(0), r"LastK's `k`.*got 0"),
        (lambda: Every(0), r"Every's `epochs`.*got 0"),
        (lambda: Every(k=True), r"Every's `k`.*got True"),
        (lambda: Cyclic(cycles=1.5), r"Cyclic's `cycles`.*got 1\.5"),
        (lambda: Cyclic(floor=1.0), r"`floor` must be in \[0, 1\), got 1\.0"),
        (lambda: Weighted(()), r"`shares`.*got \(\)"),
        (lambda: Weighted((0.0, 1.0)), "the first one above 0"),
        (lambda: Weighted((1.0, math.inf)), "finite"),
        (lambda: GreedySoup("val/score"), "better low or high"),
        (lambda: Predictions("median"), "got 'median'"),
        (lambda: CheckpointEnsemble(LastK(), "mean"), "`combine` must be a policy, got 'mean'"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(MisconfigurationError, match=message):
        make()
