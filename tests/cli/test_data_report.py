"""`lightning-tricks data-report`: the report of the recipe's loader, and its picture."""

from pathlib import Path

import pytest

from lightning_tricks.cli import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # how Lightning uses it
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "reviews" / "config.yaml"
SMALL = ["--data.limit=400", "--data.max_length=64", "--trainer.accelerator=cpu", "--trainer.logger=false"]


@pytest.mark.slow
def test_a_budget_wastes_less(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    waste = []
    for options in ([], ["--data.max_tokens=512", "--plot", "made/report.png"]):
        assert main(["data-report", "--ranks=2", *SMALL, *options]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "samples 321" in shown or "samples 320" in shown
        assert "on 2 rank(s)" in shown
        waste.append(float(shown.split(" waste ")[1].split("%")[0]))
    assert waste[1] < 15 < waste[0]
    assert (tmp_path / "made" / "report.png").stat().st_size > 1000
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_of_config_files(capsys, tmp_path, monkeypatch):
    """The example's, and one on top of it that a user would write."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    budget = tmp_path / "budget.yaml"
    budget.write_text("data:\n  init_args:\n    max_tokens: 512\n    max_length: 64\n    limit: 400\n")
    configs = ["--config", str(EXAMPLE), "--config", str(budget)]
    assert main(["data-report", "--ranks=2", *configs, "--trainer.accelerator=cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "on 2 rank(s)" in shown
    assert "samples 321" in shown or "samples 320" in shown
    assert float(shown.split(" waste ")[1].split("%")[0]) < 15
    assert [path.name for path in tmp_path.iterdir()] == ["budget.yaml"]
    assert main(["data-report", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_help_and_bad_options(capsys):
    assert main(["data-report", "--help"]) == 0
    assert "--ranks" in capsys.readouterr().out
    assert main(["data-report", "--ranks=0"]) == 2
    assert "`--ranks` must be at least 1, got 0" in capsys.readouterr().err
