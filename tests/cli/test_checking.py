"""`lightning-tricks check`: the report, its exit status, and that nothing is trained or written."""

import importlib.util

import pytest

from lightning_tricks.cli import main

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # how Lightning uses it
)
OWN = ["--model", "own.Net", "--data", "own.Data", "--trainer.accelerator=cpu", "--trainer.logger=false"]
STOP = "--trainer.callbacks+=lightning_tricks.callbacks.EarlyStopping"
CLIP = "--trainer.callbacks+=lightning_tricks.callbacks.GradientClipping"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture
def checked(project, capsys, monkeypatch):
    """Run `check` in this process; give its exit status and what it prints, on one line."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        code = main(["check", *OWN, *arguments])
        return code, " ".join(capsys.readouterr().out.split())

    return run


def test_exact(checked, project):
    before = sorted(path.name for path in project.iterdir() if path.name != "__pycache__")
    code, shown = checked(CLIP, STOP, "--resume")
    assert code == 0
    assert "GradientClipping one_device exact" in shown
    assert "EarlyStopping one_device exact" in shown
    assert shown.endswith("A fit would begin: all is as on one device.")
    assert sorted(path.name for path in project.iterdir() if path.name != "__pycache__") == before


def test_degraded(checked):
    code, shown = checked(CLIP, "--trainer.precision=bf16-true")
    assert code == 0
    assert "precision 'bf16-true' one_device degraded weights, gradients and moments are bf16 themselves" in shown
    assert shown.endswith("A fit would begin, with 1 of 2 lines above not as on one device.")


def test_refused(checked):
    code, shown = checked(CLIP, STOP, "--trainer.gradient_clip_val=1.0", "--trainer.limit_val_batches=0")
    assert code == 1
    assert "both clip gradients: remove one" in shown
    assert "give it a validation dataloader" in shown
    assert shown.endswith("A fit would be refused: 2 of 4 lines above.")


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="not run: needs DeepSpeed")
def test_stacked_configs(checked, project):
    (project / "a.yaml").write_text("trainer:\n  strategy: zero_2\n  gradient_clip_val: 1.0\n")
    (project / "b.yaml").write_text("trainer:\n  gradient_clip_algorithm: value\n")
    code, shown = checked("--config", "a.yaml")
    assert (code, "zero_2 exact" in shown) == (0, True)
    code, shown = checked("--config", "a.yaml", "--config", "b.yaml")
    assert (code, "DeepSpeed clips by the norm only" in shown) == (1, True)


def test_what_fit_would_not_understand_is_refused(project, refused):
    assert "`zro_2` is not a strategy" in refused("check", *OWN, "--strategy", "zro_2")
    assert "`--trainr.max_epochs` is not an option" in refused("check", *OWN, "--trainr.max_epochs", "3")
