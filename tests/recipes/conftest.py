"""A tiny encoder of real architecture, the user's small file, and a token cache that is thrown away."""

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from lightning_tricks.data.packages import minilm_folder

WORDS = ["film", "good", "bad", "plot", "dull", "actor", "story", "scene", "long", "great"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A BERT of two narrow layers with MiniLM's vocabulary."""
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_bytes((minilm_folder() / name).read_bytes())
    return str(folder)


@pytest.fixture
def tsv(tmp_path):
    """Sixty texts of three classes, 30, 20 and 10; the class can be told from a word."""
    generator = np.random.default_rng(0)
    rows = ["mood\tremark"]
    for index, mood in enumerate(["calm"] * 30 + ["keen"] * 20 + ["rare"] * 10):
        words = generator.choice(WORDS, 2 + index % 7)
        rows.append(f"{mood}\t{' '.join([mood, *words])}")
    path = tmp_path / "remarks.tsv"
    path.write_text("\n".join(rows) + "\n")
    return path
