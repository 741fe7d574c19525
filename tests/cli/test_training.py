"""`fit` and its like: what is understood, what is linked, what is refused."""

import subprocess
import sys

import pytest
import torch

from lightning_tricks.cli.training import TricksCLI

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # how Lightning uses it
)
OWN = ["--model", "own.Net", "--data", "own.Data"]
LIGHT = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def run(*arguments, folder):
    command = [sys.executable, "-m", "lightning_tricks", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--strategy", "zro_2"], "`zro_2` is not a strategy. Did you mean `zero_2`"),
        (["--strategy=fsdp_2"], "Did you mean `fsdp2`"),
        (["--trainr.max_epochs", "3"], "`--trainr.max_epochs` is not an option. Did you mean `--trainer.max_epochs`"),
        (["--model.widht", "3"], "`own.Net` has no option `widht`. Did you mean `width`?"),
        (["--trainer.callbacks+=GradientCliping"], "Did you mean `GradientClipping`"),
        (["--trainer.callbacks+=lightning_tricks.callbacks.EarlyStoping"], "Did you mean `EarlyStopping`"),
        (["--trainer.max_steps", "many"], "trainer.max_steps"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--trainer.accelerator", "cpu", "--devices", "4096"], "`devices=4096` asks for 4096 processes"),
        (["--trainer.default_root_dir", "own.py/runs"], "The output folder `own.py/runs` cannot be written"),
        (["--ckpt_path", "none.ckpt"], "There is no checkpoint at `none.ckpt`"),
        (["--data", "own.BrokenData"], "column `text` is blank in row 2"),
    ],
)
def test_bad_input_is_refused_before_training(project, refused, arguments, expected):
    assert expected in refused("fit", *OWN, *arguments)


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        ("EarlyStopping", "patience"),
        ("GradientClipping", "limit"),
    ],
)
def test_a_callback_out_of_range_is_refused(project, refused, callback, expected):
    option = {"EarlyStopping": "patience=0", "GradientClipping": "policy=0"}[callback]
    arguments = [f"--trainer.callbacks+=lightning_tricks.callbacks.{callback}", f"--trainer.callbacks.{option}"]
    message = refused("fit", *OWN, *arguments)
    assert expected in message
    assert "got 0" in message


def test_truncated_checkpoint_is_refused(project, refused):
    torch.save({"state_dict": {}, "loops": {}}, "whole.ckpt")
    content = (project / "whole.ckpt").read_bytes()
    (project / "cut.ckpt").write_bytes(content[: len(content) // 2])
    assert "The checkpoint `cut.ckpt` is incomplete" in refused("fit", *OWN, "--ckpt_path", "cut.ckpt")


@pytest.fixture
def built(project, monkeypatch):
    """Build what `fit` would train, without training it."""
    monkeypatch.setattr(TricksCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *arguments: TricksCLI(["fit", *LIGHT, "--trainer.logger=false", *arguments])


def test_labels_and_counts_come_from_the_data(built):
    cli = built("--model", "own.Labelled", "--data", "own.LabelledData")
    assert (cli.model.labels, cli.model.class_counts) == (["yes", "no"], [5, 3])


def test_data_without_labels_leave_the_option_to_the_user(built):
    cli = built("--model", "own.Labelled", "--data", "own.Data", "--model.labels", "[a, b, c]")
    assert cli.model.labels == ["a", "b", "c"]


def test_a_module_without_labels_works_with_any_data(built):
    assert built("--model", "own.Net", "--data", "own.LabelledData", "--model.width=5").model.layer.out_features == 5


def test_the_recipe_is_the_default(built):
    cli = built("--data.limit=60", "--model.tuning=head", "--model.lr=0.01")
    assert type(cli.model).__name__ == "TextClassifier"
    assert cli.model.labels == cli.datamodule.labels
    assert cli.model.hparams["class_counts"] == cli.datamodule.class_counts


def test_short_forms_reach_the_trainer(built):
    cli = built(*OWN, "--devices", "1", "--strategy=ddp")
    assert cli.trainer.num_devices == 1
    assert cli.config.fit.trainer.strategy == "ddp"


def test_configs_stack_and_interpolate(built, project):
    (project / "a.yaml").write_text("rows: 4\n".replace("rows", "seed_everything") + "data: {class_path: own.Data}\n")
    (project / "b.yaml").write_text("trainer:\n  max_steps: 3\n  min_steps: ${trainer.max_steps}\n")
    cli = built("--model", "own.Net", "--config", "a.yaml", "--config", "b.yaml", "--trainer.max_steps", "5")
    assert (cli.trainer.max_steps, cli.trainer.min_steps, cli.config.fit.seed_everything) == (5, 3, 4)


@pytest.mark.slow
def test_resume_goes_on_or_starts_afresh_and_says_so(project):
    fit = ["fit", *OWN, *LIGHT]
    said = run(*fit, "--trainer.max_steps=2", "--resume", folder=project)
    assert "No checkpoint to resume from in `runs`: starting afresh." in " ".join(said.split())
    said = run(*fit, "--trainer.max_steps=3", "--resume", folder=project)
    assert "epoch=0-step=2.ckpt" in said
    assert "Restored all states" in said
    newest = max((project / "runs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert torch.load(newest, weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_processes_that_lightning_starts_resume_from_the_same(project):
    fit = ["fit", *OWN, *LIGHT, "--strategy", "ddp", "--devices", "2"]
    run(*fit, "--trainer.max_steps=1", folder=project)
    said = run(*fit, "--trainer.max_steps=2", "--resume", folder=project)
    assert said.count("Resuming from") == 1
    newest = max((project / "runs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert torch.load(newest, weights_only=True)["global_step"] == 2


def test_resume_and_a_path_contradict(project, refused, monkeypatch):
    torch.save({"state_dict": {}, "loops": {}}, "whole.ckpt")
    arguments = [*OWN, *LIGHT, "--trainer.logger=false", "--ckpt_path", "whole.ckpt", "--resume"]
    assert "`--resume` and `--ckpt_path` both name a checkpoint" in refused("fit", *arguments)
