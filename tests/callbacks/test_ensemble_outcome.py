"""What is said and left behind when a checkpoint ensemble's fit has ended, and what is said before about adapters."""

import math
import re

import pytest
import torch

from lightning_tricks.callbacks import CheckpointEnsemble, Cyclic, Every, GreedySoup, LastK, Predictions, TopK
from lightning_tricks.errors import CheckpointError
from lightning_tricks.inference import average_checkpoints

SCORES = [3.0, 1.0, 2.0, 1.5]
TOP = TopK(3, monitor="val/score", mode="min")


class Out:
    """The files of a folder, by kind."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, kind):
        return sorted(path.name for path in self.folder.glob(f"{kind}-*"))


@pytest.fixture
def counting(scripted):
    """Counts its training batches in an integer buffer."""

    class Counting(scripted):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_buffer("seen", torch.tensor(0))

        def training_step(self, batch, index):
            self.seen += 1
            return super().training_step(batch, index)

    return Counting


@pytest.mark.parametrize(("members", "steps"), [(LastK(3), [12, 10, 8]), (TOP, [4, 8, 6]), (Every(2, k=2), [12, 8])])
def test_members_kept_apart_are_of_their_own_step(trainer, counting, tmp_path, members, steps):
    callback = CheckpointEnsemble(members, Predictions())
    trainer([callback]).fit(counting([*SCORES, 9.0, 9.0]))
    files = [torch.load(path, weights_only=True) for path in callback.paths]
    assert [file["global_step"] for file in files] == steps
    assert [file["epoch"] for file in files] == [step // 2 - 1 for step in steps]
    assert [file["state_dict"]["seen"].item() for file in files] == steps
    average_checkpoints(callback.paths, tmp_path / "mean.ckpt")
    mean = torch.load(tmp_path / "mean.ckpt", weights_only=True)
    assert mean["state_dict"]["seen"].item() == mean["global_step"] == max(steps)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_says_how_it_compares_and_where_it_lies(trainer, scripted, told):
    callback = CheckpointEnsemble(TopK(2, monitor="val/loss"))
    trainer([callback], max_epochs=3).fit(scripted())
    found, best = (callback.results[which]["val/loss"] for which in ("ensemble", "best"))
    assert f"CheckpointEnsemble of 2: `val/loss` {found}, best single {best}; written to {callback.path}." in told.text


@pytest.mark.parametrize("members", [LastK(6), TopK(6, monitor="val/loss")])
def test_a_soup_says_what_it_left_out(trainer, scripted, told, members):
    callback = CheckpointEnsemble(members, GreedySoup("val/loss"))
    trainer([callback]).fit(scripted(lr=0.3))
    assert callback.rejected
    for member, score in callback.rejected.items():
        assert re.search(rf"; left out: .*\b{member} \(`val/loss` {score} with it\)", told.text)


@pytest.mark.parametrize(
    ("members", "combine", "words"),
    [
        (LastK(9), None, "CheckpointEnsemble of 4 (of LastK(k=9) there were only 4): `val/loss`"),
        (LastK(9), GreedySoup("val/loss"), "(of LastK(k=9) there were only 4)"),
        (LastK(9), Predictions(), "CheckpointEnsemble of 4 (of LastK(k=9) there were only 4), each a checkpoint of"),
        (TopK(5, monitor="val/loss"), None, "(of TopK(k=5, monitor='val/loss', mode='auto') there were only 4)"),
        (Every(2), None, "CheckpointEnsemble of 2 (of Every(epochs=2, k=10) there were only 2)"),
    ],
)
def test_says_that_there_were_fewer_members(trainer, scripted, told, members, combine, words):
    callback = CheckpointEnsemble(members, *([combine] if combine else []))
    trainer([callback], max_epochs=4).fit(scripted())
    assert words in told.text


def test_says_nothing_of_fewer_where_there_are_enough(trainer, scripted, told):
    trainer([CheckpointEnsemble(LastK(4))], max_epochs=4).fit(scripted())
    assert "CheckpointEnsemble of 4: " in told.text


def test_says_that_it_was_not_scored(trainer, scripted, told):
    trainer([CheckpointEnsemble(LastK(1))], max_epochs=1, limit_val_batches=0).fit(scripted())
    assert "CheckpointEnsemble of 1, not scored; written to" in told.text


# -- a second fit ------------------------------------------------------------------------------------------------------


def test_a_second_fit_of_the_trainer_has_its_own_paths(trainer, scripted, tmp_path):
    callback, module = CheckpointEnsemble(LastK(2), Predictions(), dirpath=tmp_path / "out"), scripted()
    run = trainer([callback], max_epochs=3)
    run.fit(module)
    run.fit_loop.max_epochs = 5
    run.fit(module)
    assert [torch.load(path, weights_only=True)["epoch"] for path in callback.paths] == [4, 3]
    assert Out(tmp_path / "out")["prediction"] == sorted(path.name for path in callback.paths)
    assert len(Out(tmp_path / "out")["member"]) == 2


def test_a_second_fit_has_its_own_results(trainer, scripted):
    callback, module = CheckpointEnsemble(LastK(3), GreedySoup("val/score", mode="max")), scripted()
    run = trainer([callback], max_epochs=3)
    run.fit(module)
    assert callback.path.is_file()
    module.scores, run.fit_loop.max_epochs = [math.nan], 4
    with pytest.warns(UserWarning, match="no member has a finite `val/score`"):
        run.fit(module)
    assert (callback.path, callback.results, callback.rejected) == (None, {}, {})


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(scripted):
    """Trains the two factors of an adapter."""

    class Adapted(scripted):
        def __init__(self):
            super().__init__()
            self.layer.requires_grad_(False)
            self.layer.lora_A = torch.nn.Parameter(torch.ones(1, 2))
            self.layer.lora_B = torch.nn.Parameter(torch.zeros(1, 1))

        def loss(self, batch):
            adapter = batch[0] @ self.layer.lora_A.T @ self.layer.lora_B
            return torch.nn.functional.mse_loss(self.layer(batch[0]) + adapter, batch[1])

    return Adapted


@pytest.mark.parametrize("members", [LastK(2), TopK(2, monitor="val/loss"), Cyclic(2)])
def test_an_average_of_adapters_is_announced_once_before_the_fit(trainer, adapted, members):
    class Stops(adapted):
        def on_train_start(self):
            raise KeyError("begun")

    message = r"will average adapters \(`layer.lora_A`\), A and B apart.*products BA.*combine=Predictions\(\).*module="
    with pytest.raises(KeyError, match="begun"), pytest.warns(UserWarning, match=message) as warned:
        trainer([CheckpointEnsemble(members)]).fit(Stops())
    assert len([each for each in warned if "adapters" in str(each.message)]) == 1


def test_adapters_kept_apart_are_no_average(trainer, adapted):
    trainer([CheckpointEnsemble(LastK(2), Predictions())], max_epochs=2).fit(adapted())


def test_frozen_adapters_are_averaged_right(trainer, adapted):
    module = adapted()
    module.layer.requires_grad_(True)
    module.layer.lora_A.requires_grad_(False)
    module.layer.lora_B.requires_grad_(False)
    trainer([CheckpointEnsemble(LastK(2))], max_epochs=2).fit(module)


def test_given_adapters_are_told_by_a_part_of_the_name(trainer, scripted, tmp_path):
    weights = scripted().state_dict()
    torch.save({"state_dict": {**weights, "layer.lora_A": torch.ones(1, 3)}}, tmp_path / "adapter.ckpt")
    torch.save({"state_dict": {**weights, "flora_1.weight": torch.ones(1, 3)}}, tmp_path / "flowers.ckpt")
    for name, message in [("adapter", "holds adapters"), ("flowers", "of another module: `flora_1.weight`")]:
        with pytest.raises(CheckpointError, match=message):
            trainer([CheckpointEnsemble([tmp_path / f"{name}.ckpt"])]).fit(scripted())
