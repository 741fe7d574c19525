"""`average`, `soup` and `cross-validate`."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from lightning_tricks.cli import main
from lightning_tricks.engines import read_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

FOLDED = """
import os

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Line(L.LightningModule):
    def __init__(self, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def loss(self, batch):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, index):
        if self.global_step == int(os.environ.get("DIES_AT", -1)) and self.trainer.datamodule.fold[0] == 1:
            os.kill(os.getpid(), 9)
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class Folds(L.LightningDataModule):
    def __init__(self, path: str = "", fold: tuple[int, int] | None = None):
        super().__init__()
        self.path, self.fold = path, fold

    def rows(self, held):
        place, count = self.fold or (0, 2)
        x = torch.arange(24.0).view(12, 2) / 24
        own = torch.arange(12) % count == place
        chosen = own if held else ~own
        return DataLoader(TensorDataset(x[chosen], x[chosen].sum(1, keepdim=True)), batch_size=4)

    def train_dataloader(self):
        return self.rows(False)

    def val_dataloader(self):
        return self.rows(True)
"""
CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {dirpath: elsewhere/saved, filename: "{step}", every_n_train_steps: 2, save_top_k: -1}
model: {class_path: folded.Line}
data: {class_path: folded.Folds}
"""


@pytest.fixture
def folded(project):
    (project / "folded.py").write_text(textwrap.dedent(FOLDED))
    (project / "config.yaml").write_text(CONFIG)
    return project


def saved(folder, name, values, **rest):
    state = {"layer.weight": torch.tensor([values]), "layer.bias": torch.zeros(1)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0", **rest}, folder / f"{name}.ckpt")
    return str(folder / f"{name}.ckpt")


def test_average(project, capsys):
    paths = [saved(project, str(value), [value, 0.0]) for value in (1.0, 4.0)]
    assert main(["average", *paths, "--out", "mean.ckpt", "--weights", "1", "3"]) == 0
    assert read_checkpoint("mean.ckpt")["state_dict"]["layer.weight"].tolist() == [[3.25, 0.0]]
    assert "`mean.ckpt`, the mean of 2 checkpoints" in capsys.readouterr().err


def test_average_refuses_and_skips(project, refused, capsys):
    good = [saved(project, str(value), [value, 0.0]) for value in (1.0, 4.0)]
    odd = saved(project, "odd", [1.0, 2.0, 3.0])
    said = refused("average", good[0], odd, good[1], "--out", "mean.ckpt")
    assert "odd.ckpt" in said
    assert "`layer.weight`" in said
    assert main(["average", good[0], odd, good[1], "--out", "mean.ckpt", "--skip-bad"]) == 0
    assert "Left out" in capsys.readouterr().err
    assert read_checkpoint("mean.ckpt")["state_dict"]["layer.weight"].tolist() == [[2.5, 0.0]]


def test_average_skips_a_first_file_that_is_damaged(project, capsys):
    (project / "broken.ckpt").write_bytes(b"no checkpoint")
    good = [saved(project, str(value), [value, 0.0]) for value in (1.0, 4.0)]
    assert main(["average", "broken.ckpt", *good, "--out", "mean.ckpt", "--skip-bad"]) == 0
    assert "Left out `broken.ckpt`" in capsys.readouterr().err
    assert read_checkpoint("mean.ckpt")["state_dict"]["layer.weight"].tolist() == [[2.5, 0.0]]


@pytest.mark.parametrize("kind", ["own.Net", "own.Gone", "nowhere.Net"])
def test_adapters_of_another_module_are_refused_as_such(project, refused, kind):
    state = {"layer.lora_A": torch.ones(1, 2), "layer.lora_B": torch.ones(1, 3)}
    torch.save({"state_dict": state, "hyper_parameters": {"_class_path": kind}}, "adapted.ckpt")
    said = refused("average", "adapted.ckpt", "adapted.ckpt", "--out", "mean.ckpt")
    assert "adapted.ckpt holds adapters (`layer.lora_A`)" in said


def test_adapters_of_a_text_classifier_are_merged(project):
    from lightning.pytorch import Trainer

    from lightning_tricks.cli.prediction import load_classifier
    from lightning_tricks.recipes import TextClassifier

    paths, products = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model = TextClassifier(["bad", "good"], class_weighting="none", rank=2)
        layer = model.encoder.encoder.layer[0].attention.self.query
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        products.append(2 * (layer.lora_B.double().t() @ layer.lora_A.double()))  # alpha is twice the rank
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(f"{seed}.ckpt")
        paths.append(f"{seed}.ckpt")
        base = layer.weight.detach().double()
    assert main(["average", *paths, "--out", "mean.ckpt"]) == 0
    merged = load_classifier("mean.ckpt").encoder.encoder.layer[0].attention.self.query
    torch.testing.assert_close(merged.weight.double(), base + sum(products) / 2, rtol=1e-5, atol=1e-6)
    assert not merged.lora_B.any()


def test_soup(folded, capsys):
    weights = {"best": [1.1, 1.1], "helps": [0.8, 0.8], "spoils": [3.0, 3.0]}
    paths = [saved(folded, name, values) for name, values in weights.items()]
    command = ["soup", *paths, "--out", "soup.ckpt", "--monitor", "val/loss", "--config", "config.yaml"]
    assert main(command) == 0
    assert read_checkpoint("soup.ckpt")["state_dict"]["layer.weight"][0].tolist() == pytest.approx([0.95, 0.95])
    said = capsys.readouterr().err
    assert "spoils.ckpt` (itself" in said
    assert "the mean of 2 of 3 checkpoints: val/loss" in said


def test_soup_skips_what_is_damaged(folded, capsys):
    (folded / "broken.ckpt").write_bytes(b"no checkpoint")
    paths = ["broken.ckpt", saved(folded, "best", [1.1, 1.1]), saved(folded, "helps", [0.8, 0.8])]
    command = ["soup", *paths, "--out", "soup.ckpt", "--monitor", "val/loss", "--config", "config.yaml"]
    assert main(command) == 2
    assert "broken.ckpt" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().err
    assert "Left out `broken.ckpt`" in said
    assert "the mean of 2 of 2 checkpoints" in said


def test_soup_refuses(folded, refused):
    paths = [saved(folded, "a", [1.0, 1.0]), saved(folded, "b", [1.0, 2.0])]
    command = ["soup", *paths, "--out", "soup.ckpt", "--config", "config.yaml", "--monitor"]
    assert "does not log `val/f1`. It logs `val/loss`" in refused(*command, "val/f1")
    assert "better low or high" in refused(*command, "val/score")
    assert not (folded / "soup.ckpt").exists()


def folds_of(out):
    return [json.loads((out / f"fold_{number}" / "result.json").read_text())["scores"] for number in range(3)]


COMMAND = ["cross-validate", "--config", "config.yaml", "--folds", "3", "--out", "cv"]


def test_cross_validate(folded, capsys):
    assert main(COMMAND) == 0
    shown = capsys.readouterr().out
    found = json.loads((folded / "cv" / "cross_validation.json").read_text())
    losses = [fold["val/loss"] for fold in folds_of(folded / "cv")]
    assert len(set(losses)) == 3
    assert found["metrics"]["val/loss"]["mean"] == pytest.approx(np.mean(losses))
    assert found["metrics"]["val/loss"]["std"] == pytest.approx(np.std(losses, ddof=1))
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in shown
    assert len(list((folded / "cv").glob("fold_*/model.ckpt"))) == 3
    assert len(list((folded / "cv").glob("fold_*/saved/*.ckpt"))) == 9  # each fold's own, below its folder
    assert not (folded / "elsewhere").exists()
    before = (folded / "cv" / "fold_0" / "model.ckpt").stat().st_mtime_ns
    assert main(COMMAND) == 0
    assert "is finished already" in capsys.readouterr().err
    assert (folded / "cv" / "fold_0" / "model.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_killed_cross_validation_goes_on(folded):
    assert main([*COMMAND[:-1], "whole"]) == 0
    environment = {**os.environ, "DIES_AT": "5", "PYTHONPATH": f"{folded}:{os.environ.get('PYTHONPATH', os.getcwd())}"}
    killed = subprocess.run([sys.executable, "-m", "lightning_tricks", *COMMAND], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-3000:]
    assert (folded / "cv" / "fold_0" / "result.json").exists()
    assert not (folded / "cv" / "fold_1" / "result.json").exists()
    assert (folded / "cv" / "fold_1" / "saved").exists()
    assert main(COMMAND) == 0
    assert folds_of(folded / "cv") == folds_of(folded / "whole")


def test_cross_validate_refuses(folded, refused):
    assert "`--folds` must be 2 or more, got 1" in refused("cross-validate", "--folds", "1")
    assert "trains on one device" in refused(*COMMAND, "--devices", "2")
    assert "fold" in refused(*COMMAND, "--data", "own.Data")
    assert main(COMMAND) == 0
    assert "holds a fold of other options" in refused(*COMMAND, "--trainer.max_epochs=1")


@pytest.mark.parametrize("how", ["in the configuration", "on the command line", "a folder"])
def test_finished_folds_are_not_those_of_other_data(folded, refused, how):
    """A row was added to the data: what was scored before says nothing of them."""
    (folded / "rows").mkdir()
    (folded / "rows" / "data.csv").write_text("a,b\n1,2\n")
    path = "rows" if how == "a folder" else "rows/data.csv"
    command = [*COMMAND, f"--data.path={path}"]
    if how == "in the configuration":
        (folded / "config.yaml").write_text(
            CONFIG.replace("folded.Folds}", f"folded.Folds, init_args: {{path: {path}}}}}")
        )
        command = COMMAND
    assert main(command) == 0
    before = (folded / "cv" / "fold_0" / "model.ckpt").stat().st_mtime_ns
    assert main(command) == 0
    assert (folded / "cv" / "fold_0" / "model.ckpt").stat().st_mtime_ns == before
    (folded / "rows" / "data.csv").write_text("a,b\n1,2\n3,4\n")
    assert "other data" in refused(*command)


def test_the_review_data_know_folds():
    from lightning_tricks.recipes import TextClassificationData

    parts = [TextClassificationData(limit=300, fold=(k, 3)) for k in range(3)]
    held = [row for part in parts for row in part._split.val.tolist()]
    assert len(held) == len(set(held)) == 270
    assert [sum(part.class_counts) for part in parts] == [180] * 3
