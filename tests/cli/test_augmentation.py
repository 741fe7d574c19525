"""`lightning-tricks augment`: a configuration, what it writes, and a fit that trains on it."""

import csv
from pathlib import Path

import pytest
import yaml

from lightning_tricks.cli import main
from lightning_tricks.data.packages import minilm_folder
from tests.data import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
CONFIG = Path(__file__).parents[2] / "examples" / "augment" / "config.yaml"
KINDS = {"MaskedReplacement": "masked", "BackTranslation": "translation", "Paraphrase": "paraphrase"}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The example, with tiny models and a small file."""
    monkeypatch.chdir(tmp_path)
    with Path("source.csv").open("w", newline="") as file:
        texts = [(f"a {word} film the plot was {word}", word) for word in ("good", "bad", "dull", "slow") * 3]
        csv.writer(file).writerows([("text", "category"), *texts])
    found = yaml.safe_load(CONFIG.read_text())
    for method in found["methods"]:
        kind = KINDS[method["class_path"].rpartition(".")[2]]
        folder = getattr(tiny_models, kind)(tmp_path / kind)
        options = {name: folder for name in method["init_args"] if name in ("model", "there", "back")}
        method["init_args"].update(options)
    found.update(path="source.csv", copies=2)
    Path("config.yaml").write_text(yaml.safe_dump(found))
    return found


def test_the_example_runs_with_other_models(config, capsys):
    assert main(["augment", "--config", "config.yaml", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Wrote `runs/augment/reviews.csv`" in shown
    with Path("runs/augment/reviews.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"{len(rows)} texts made of 12" in shown
    assert {row["method"] for row in rows} == {"masked_replacement", "back_translation", "paraphrase"}
    assert {row["seed"] for row in rows} == {"3"}
    assert main(["augment", "--config", "config.yaml", "--seed", "3"]) == 0
    assert capsys.readouterr().out == shown


def test_the_example_names_real_options_and_every_method():
    methods = yaml.safe_load(CONFIG.read_text())["methods"]
    assert [method["class_path"] for method in methods] == [f"lightning_tricks.data.{name}" for name in KINDS]


def test_bad_input_is_one_message(config, refused):
    assert "has no column `mood`" in refused("augment", "--config", "config.yaml", "--label", "mood")
    assert "`--copy` is not an option" in refused("augment", "--config", "config.yaml", "--copy", "3")
    assert "`seed`" in refused("augment", "--config", "config.yaml", "--seed", "-3")
    assert "out" in refused("augment", "--path", "source.csv")
    encoder = {"class_path": "lightning_tricks.data.MaskedReplacement", "init_args": {"model": str(minilm_folder())}}
    Path("config.yaml").write_text(yaml.safe_dump({**config, "methods": [encoder]}))
    assert "has no trained head for masked words" in refused("augment", "--config", "config.yaml")
    encoder["init_args"]["share"] = 3
    Path("config.yaml").write_text(yaml.safe_dump({**config, "methods": [encoder]}))
    assert "`share` must be above 0 and at most 1" in refused("augment", "--config", "config.yaml")
    encoder["class_path"] = "lightning_tricks.data.Masked"
    Path("config.yaml").write_text(yaml.safe_dump({**config, "methods": [encoder]}))
    assert "Masked" in refused("augment", "--config", "config.yaml")
    assert not Path("runs/augment/reviews.csv").exists()


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["augment", "--help"])
    shown = capsys.readouterr().out
    assert "--max_similarity" in shown
    assert "--methods" in shown
