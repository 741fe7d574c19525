"""The catalogue's files are what the code says, and each stacks through the real parser."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_tricks import callbacks
from lightning_tricks.cli import main
from lightning_tricks.cli.catalogue import entries, write
from lightning_tricks.cli.signatures import argument_lines, call_in_example
from lightning_tricks.cli.training import TricksCLI
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.strategies import PRESETS

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "reviews" / "config.yaml"
STACKABLE = {name: entry for name, entry in entries().items() if entry.path}
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def test_the_catalogue_is_what_the_code_says(tmp_path):
    written = [path.relative_to(tmp_path) for path in write(tmp_path)]
    for folder in ("callbacks", "strategies"):
        kept = {path.relative_to(ROOT) for path in (ROOT / folder).iterdir()}
        assert kept == {path for path in written if path.parts[0] == folder}, "run `make catalogue`"
    for path in written:
        assert (ROOT / path).read_text() == (tmp_path / path).read_text(), f"{path} is stale: run `make catalogue`"


@pytest.fixture
def built(project, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_TRICKS_NVME", f"{tmp_path}")
    monkeypatch.setattr(TricksCLI, "_run_subcommand", lambda self, subcommand: None)
    light = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    return lambda *arguments: TricksCLI(["fit", *light, *arguments])


@pytest.mark.parametrize("name", STACKABLE)
def test_each_file_stacks_and_builds_what_it_names(built, name):
    own = [
        "--model",
        "own.Net",
        "--data",
        "own.Data",
        "--trainer.callbacks+=lightning.pytorch.callbacks.DeviceStatsMonitor",
    ]
    trainer = built(*own, "--config", str(ROOT / STACKABLE[name].path)).trainer
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    if STACKABLE[name].kind == "callback":
        assert name in kinds
    else:
        assert type(trainer.strategy) is type(PRESETS[name].function(**PRESETS[name].arguments))
    assert "DeviceStatsMonitor" in kinds


@pytest.mark.parametrize("name", STACKABLE)
def test_each_file_adds_to_the_example(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(CONFIG), "--config", str(ROOT / STACKABLE[name].path), "--print_config"])
    assert ended.value.code in (0, None)
    before, after = OmegaConf.load(CONFIG).trainer, OmegaConf.create(capsys.readouterr().out).trainer
    if STACKABLE[name].kind == "callback":
        assert len(after.callbacks) == len(before.callbacks) + 1
        assert after.callbacks[-1].class_path == f"lightning_tricks.callbacks.{name}"
    else:
        assert after.strategy == name
        assert len(after.callbacks) == len(before.callbacks)


@pytest.mark.parametrize("flag", PRESETS)
def test_the_longer_form_of_a_preset_builds_the_same(built, project, flag):
    lines = [line.removeprefix("#     ") for line in entries()[flag].text.splitlines() if line.startswith("#     ")]
    (project / "longer.yaml").write_text("\n".join(lines[next(i for i, s in enumerate(lines) if s == "trainer:") :]))
    own = ["--model", "own.Net", "--data", "own.Data"]
    longer = built(*own, "--config", "longer.yaml").trainer.strategy
    short = built(*own, "--strategy", flag).trainer.strategy
    assert type(longer) is type(short)
    assert getattr(longer, "stage", None) == getattr(short, "stage", None)


def test_values_come_from_the_example_and_defaults_from_the_signature():
    path, arguments = call_in_example(callbacks.EarlyStopping)
    assert path == "lightning_tricks.callbacks.EarlyStopping"
    assert arguments == {**arguments, "monitor": "val/macro_f1", "mode": "auto", "restore_best": True}
    assert next(iter(arguments)) == "monitor"


def test_policies_become_nested_classes_with_their_arguments_explained():
    _, arguments = call_in_example(callbacks.CheckpointEnsemble)
    assert arguments["members"]["class_path"] == "lightning_tricks.callbacks.TopK"
    assert arguments["members"]["init_args"]["k"] == 3
    lines = list(argument_lines(callbacks.CheckpointEnsemble, arguments))
    assert any(line.startswith("    k: ") for line in lines)
    assert not any(line.startswith("scores:") for line in lines)  # an attribute


def test_a_trick_without_an_example_is_named():
    with pytest.raises(MisconfigurationError, match="Path has no example"):
        call_in_example(Path)


def test_list_has_a_line_for_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    for name, entry in entries().items():
        assert any(line.split()[:1] == [name] and entry.summary in line for line in shown)


@pytest.mark.parametrize("name", entries())
def test_show_prints_the_entry(capsys, name):
    assert main(["show", name.lower()]) == 0
    assert capsys.readouterr().out == entries()[name].text


@pytest.mark.parametrize("name", [name for name, entry in entries().items() if entry.kind == "mixin"])
def test_what_is_shown_of_a_mixin_runs(name):
    scope = {}
    exec(entries()[name].text, scope)
    bases = {
        value: {base.__name__ for base in value.__mro__[1:]} for value in scope.values() if isinstance(value, type)
    }
    built = [found() for found in bases if name in bases[found]]
    assert built, "the example subclasses something else"


def test_show_suggests_the_nearest(refused):
    assert "Did you mean `GradientClipping`?" in refused("show", "GradientCliping")
