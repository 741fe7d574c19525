"""A project of a user's own: a module and data, importable, in a folder of its own."""

import textwrap

import pytest

OWN = '''
import lightning as L
import torch


class Net(L.LightningModule):
    """Has no `labels`."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Labelled(Net):
    """Takes its labels from the data, if that has any."""

    def __init__(self, labels: list[str], class_counts: list[int] | None = None):
        super().__init__(len(labels))
        self.labels, self.class_counts = labels, class_counts


class Data(L.LightningDataModule):
    """Has no labels."""

    def __init__(self, rows: int = 8):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(self.rows, 2), batch_size=2)

    val_dataloader = train_dataloader


class LabelledData(Data):
    """Has labels and their counts."""

    labels, class_counts = ["yes", "no"], [5, 3]


class BrokenData(Data):
    """Refuses to be built."""

    def __init__(self):
        from lightning_tricks.errors import DataError

        raise DataError("column `text` is blank in row 2")
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The folder of a user's project, with `own.py` in it, as the working directory."""
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capsys):
    """Run the command in this process; give what it says when it exits with 2."""
    from lightning_tricks.cli import main

    def run(*arguments):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return run
