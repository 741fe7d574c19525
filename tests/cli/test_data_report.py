"""`lightning-tricks data-report`: the report of the recipe's loader, and its picture."""

import pytest

from lightning_tricks.cli import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # how Lightning uses it
)
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


def test_help_and_bad_options(capsys):
    assert main(["data-report", "--help"]) == 0
    assert "--ranks" in capsys.readouterr().out
    assert main(["data-report", "--ranks=0"]) == 2
    assert "`--ranks` must be at least 1, got 0" in capsys.readouterr().err
