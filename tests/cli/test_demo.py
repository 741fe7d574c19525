"""The demo: its rows, its report, and an early end."""

import dataclasses
import json
import subprocess
import sys

import pytest
from matplotlib.image import imread

from lightning_tricks.cli import comparison, demo, main
from lightning_tricks.cli.comparison import ROWS, Budget, Result
from lightning_tricks.cli.demo_plot import plot
from lightning_tricks.cli.demo_report import table

TINY = Budget(steps=4, validations=2, batch_size=4, max_length=8, limit=100)
LABELS = ["fresh", "plot", "rotten"]


def result(name, clip=None, **metrics):
    recalls = {f"recall_{label}": 0.5 for label in LABELS}
    curve = [(step, 1 / (step + 1)) for step in range(30)]
    return Result(
        name=name,
        learning_rate=1e-3,
        metrics={"accuracy": 0.5, "macro_f1": 0.5, **recalls, **metrics},
        seconds=12.3,
        training_seconds=10.0,
        cpu_seconds=10.0,
        texts=4870,
        steps=30,
        trainable=74883,
        checkpoint_bytes=310_000,
        clip=clip,
        curves={"train/loss": curve, **({"grad_norm/total": curve} if clip else {})},
    )


def test_rows_differ_by_one_trick_each_and_share_the_budget():
    assert [(row.tuning, row.class_weighting, row.tricks, row.by_tokens) for row in ROWS] == [
        ("head", "none", False, False),
        ("lora", "none", False, False),
        ("lora", "balanced", False, False),
        ("lora", "balanced", True, False),
        ("lora", "balanced", True, True),
    ]


def test_a_token_budget_is_what_a_batch_of_the_longest_holds():
    budget = dataclasses.replace(TINY, max_length=48)
    data = budget.data(seed=0, by_tokens=True)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert max(batch["input_ids"].numel() for batch in batches) <= 4 * 48
    assert max(len(batch["labels"]) for batch in batches) > 4


def test_validation_scores_a_third_of_every_length():
    data = TINY.data(seed=0)
    data.prepare_data()
    data.setup("fit")
    part = data.val_dataloader().dataset.rows
    whole = super(type(data), data).val_dataloader().dataset.rows
    assert part.tolist() == whole[::3].tolist()
    assert len(data.test_dataloader().dataset) == len(whole)


@pytest.mark.parametrize("finished", [1, 2, 5])
def test_plot_of_what_is_finished(tmp_path, finished):
    results = [result(row.name, clip=0.2 if row.tricks else None) for row in ROWS][:finished]
    plot(tmp_path / "report.png", results, LABELS)
    picture = imread(tmp_path / "report.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1500
    assert picture.std() > 0.05


def test_table_marks_the_best_and_names_the_rarest(capsys):
    from rich.console import Console

    results = [result("a", macro_f1=0.25, recall_plot=0.125), result("b", macro_f1=0.75, recall_plot=1.0)]
    Console(width=160, force_terminal=True).print(table(results, "plot"))
    shown = capsys.readouterr().out
    assert "“plot”" in shown
    assert "\x1b[1m0.750" in shown
    assert "\x1b[1m0.250" not in shown
    assert "74,883" in shown
    assert "310" in shown
    assert "487" in shown  # texts a second


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "QUICK", TINY)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_demo_trains_every_row_and_reports(tiny, tmp_path, capsys):
    assert main(["demo", "--quick", "--seed", "1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [row.name for row in ROWS]
    head, lora, _, tricks, _ = report["rows"]
    assert [row["steps"] for row in report["rows"]] == [4, 4, 4, 4, 4]
    assert [row["texts"] for row in report["rows"][:4]] == [16, 16, 16, 16]
    assert all(0 < row["training_seconds"] < row["seconds"] for row in report["rows"])
    assert head["trainable"] == 384 * 3 + 3
    assert lora["trainable"] == head["trainable"] + 6 * 2 * 8 * (384 + 384)
    assert lora["checkpoint_bytes"] < 90e6 / 50
    assert len(tricks["curves"]["grad_norm/total"]) == 4
    assert tricks["clip"] == comparison.CLIP
    assert (report["seed"], report["interrupted"]) == (1, False)
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert (tmp_path / "row_4" / "ensemble" / "ensemble.ckpt").exists()
    assert "report.png" in capsys.readouterr().out.replace("\n", "")  # a long path is wrapped


INTERRUPTED = """
import os, signal, sys
from lightning_tricks.cli import demo, main
from lightning_tricks.cli.comparison import Budget

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may have Ctrl-C ignored

class Interrupting(demo.RowProgress):
    def on_train_batch_end(self, trainer, pl_module, *rest):
        super().on_train_batch_end(trainer, pl_module, *rest)
        if pl_module.hparams["tuning"] == "lora" and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

demo.RowProgress = Interrupting
demo.QUICK = Budget(steps=4, validations=1, batch_size=4, max_length=8, limit=100)
sys.exit(main(["demo", "--quick", "--output", sys.argv[1]]))
"""


@pytest.mark.slow
def test_interrupted_demo_reports_what_is_finished(tmp_path):
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED, tmp_path], capture_output=True, text=True, timeout=250)
    assert ran.returncode == 130, ran.stderr
    assert "Interrupted" in ran.stdout
    assert "Traceback" not in ran.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"] is True
    assert [row["name"] for row in report["rows"]] == ["head only"]
    assert (tmp_path / "report.png").exists()


def test_folder_and_seed_are_checked(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("demo", "--output", str(tmp_path / "file" / "demo"))
    assert "`--seed` must be 0 or more, got -1" in refused("demo", "--seed", "-1")
