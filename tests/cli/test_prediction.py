"""`predict`: labels and probabilities from any checkpoint."""

import csv

import pytest
import torch

from lightning_tricks.cli import main
from lightning_tricks.cli.prediction import load_classifier, probabilities
from lightning_tricks.recipes import TextClassifier

LABELS = ["bad", "good", "neither"]
TEXTS = ["A slow, lovely film.", "Dull.", "A heist goes wrong and two brothers run for the coast. " * 3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier with adapters that do something, and its checkpoint as Lightning lays it out."""
    torch.manual_seed(0)
    model = TextClassifier(LABELS, class_counts=[3, 2, 1]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "classifier" in name:
                parameter.normal_(std=0.3)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "loops": {}}
    model.on_save_checkpoint(checkpoint)
    path = tmp_path_factory.mktemp("trained") / "model.ckpt"
    torch.save(checkpoint, path)
    return model, path


def by_hand(model, text, max_length=128):
    from lightning_tricks.data.tokens import load_tokenizer
    from lightning_tricks.recipes._encoders import encoder_source

    tokens = load_tokenizer(encoder_source("all-minilm-l6-v2"))(
        text, truncation=True, max_length=max_length, return_tensors="pt"
    )
    with torch.no_grad():
        return model({name: tokens[name] for name in ("input_ids", "attention_mask")}).softmax(-1)[0]


def test_loaded_classifier_gives_what_the_trained_one_gives(trained):
    model, path = trained
    found = probabilities(load_classifier(path), TEXTS, max_length=128, batch_size=2)
    expected = torch.stack([by_hand(model, text) for text in TEXTS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_texts_are_cut_at_max_length(trained):
    model, path = trained
    found = probabilities(load_classifier(path), TEXTS[2:], max_length=8)
    torch.testing.assert_close(found[0], by_hand(model, TEXTS[2], max_length=8), atol=1e-5, rtol=1e-4)


def test_texts_on_the_command_line(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    model, path = trained
    assert main(["predict", "--checkpoint", str(path), "--text", TEXTS[0], "--text", "a [red] dawn"]) == 0
    shown = capsys.readouterr().out
    expected = by_hand(model, TEXTS[0])
    assert TEXTS[0] in shown
    assert "a [red] dawn" in shown
    assert LABELS[expected.argmax()] in shown
    assert f"{expected.max():.3f}" in shown


def test_a_file_gives_a_file(trained, tmp_path, capsys):
    model, path = trained
    with (tmp_path / "in.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "remark"], *enumerate(TEXTS)])
    arguments = ["--data.path", str(tmp_path / "in.csv"), "--data.text", "remark"]
    out = tmp_path / "new" / "out.csv"
    assert main(["predict", "--checkpoint", str(path), *arguments, "--output", str(out)]) == 0
    with out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["text", "label", *(f"probability_{label}" for label in LABELS)]
    assert [row["text"] for row in rows] == TEXTS
    for row, text in zip(rows, TEXTS, strict=True):
        expected = by_hand(model, text)
        found = torch.tensor([float(row[f"probability_{label}"]) for label in LABELS])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert row["label"] == LABELS[expected.argmax()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--text", "a"], "add `--checkpoint PATH`"),
        (["--checkpoint", "none.ckpt", "--text", "a"], "none.ckpt"),
        (["--checkpoint", "none.ckpt"], "There is nothing to predict"),
        (["--checkpoint", "none.ckpt", "--text", "a", "--data.path", "b.csv"], "both give texts"),
        (["--checkpoint", "none.ckpt", "--data.path", "none.csv"], "There is no file `none.csv`"),
    ],
)
def test_bad_input_is_refused(refused, arguments, expected):
    assert expected in refused("predict", *arguments)


def test_cut_off_checkpoint_is_refused(trained, refused, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(trained[1].read_bytes()[:-1000])
    assert "cut.ckpt" in refused("predict", "--checkpoint", str(cut), "--text", "a")


def test_checkpoint_of_another_module_is_refused(refused, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {"width": 3}}, path)
    message = refused("predict", "--checkpoint", str(path), "--text", "a")
    assert "is not the checkpoint of a TextClassifier" in message
    assert "--ckpt_path" in message
