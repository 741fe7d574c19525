"""Tokens are those of the tokenizer, computed once, and found again by content."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_tricks.data import tokens
from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.data.tokens import TokenDataset, TokenizedTexts, load_tokenizer, tokenize
from lightning_tricks.errors import DataError

TEXTS = ["One film.", "Another, rather longer, film.", "naïve film", "One film."] * 300  # more than one chunk


@pytest.fixture(scope="module")
def minilm():
    return load_tokenizer(minilm_folder())


@pytest.fixture
def calls(monkeypatch):
    """How often something was really tokenised."""
    made = []
    whole = tokens._tokenize

    def counted(*arguments):
        made.append(1)
        return whole(*arguments)

    monkeypatch.setattr(tokens, "_tokenize", counted)
    return made


def test_equals_the_tokenizer_and_is_compact(minilm, tmp_path):
    found = tokenize(TEXTS, minilm, max_length=8, folder=tmp_path)
    expected = minilm(TEXTS, truncation=True, max_length=8)["input_ids"]
    assert [row.tolist() for row in (found[i] for i in range(len(found)))] == expected
    assert found.lengths.tolist() == [len(row) for row in expected]
    assert isinstance(found.tokens, np.memmap)
    assert found.tokens.dtype == np.int32


def test_is_computed_once_for_the_same_content(minilm, tmp_path, calls):
    for _ in range(2):
        tokenize(TEXTS, minilm, max_length=8, folder=tmp_path)
    tokenize(TEXTS, load_tokenizer(minilm_folder()), max_length=8, folder=tmp_path)
    assert len(calls) == 1


def test_other_content_is_another_entry(minilm, tmp_path, calls):
    other = load_tokenizer(minilm_folder())
    other.add_tokens(["rather"])
    tokenize(["ab", "c"], minilm, max_length=8, folder=tmp_path)
    tokenize(["a", "bc"], minilm, max_length=8, folder=tmp_path)
    tokenize(["ab", "c"], minilm, max_length=9, folder=tmp_path)
    tokenize(["ab", "c"], other, max_length=8, folder=tmp_path)
    assert len(calls) == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_half_written_is_ever_found(minilm, tmp_path, monkeypatch, calls):
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenize(TEXTS, minilm, max_length=8, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(tokenize(TEXTS, minilm, max_length=8, folder=tmp_path)) == len(TEXTS)


def test_processes_may_write_the_same_entry_at_once(minilm, tmp_path, monkeypatch):
    texts = ["One film.", "Two films."]
    ready = tokens._tokenize(texts, minilm, 8)
    entry = tmp_path / "entry"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: tokens._write(entry, *ready), range(32)))
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert len(tokens._load(entry)) == 2


def test_damaged_entry(minilm, tmp_path):
    tokenize(TEXTS, minilm, max_length=8, folder=tmp_path)
    (entry,) = tmp_path.iterdir()
    (entry / "offsets.npy").write_bytes(b"")
    with pytest.raises(DataError, match=f"`{entry}` is damaged: .* Delete it"):
        tokenize(TEXTS, minilm, max_length=8, folder=tmp_path)


def test_cache_that_cannot_be_written(minilm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .* Set XDG_CACHE_HOME"):
        tokenize(TEXTS, minilm, max_length=8, folder=tmp_path / "file" / "cache")


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokens.cache_folder() == tmp_path / "lightning-tricks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokens.cache_folder() == tmp_path / ".cache" / "lightning-tricks"


def test_dataset_gives_chosen_rows_with_their_labels(minilm, tmp_path):
    texts = tokenize(["one", "two films", "three"], minilm, max_length=8, folder=tmp_path)
    dataset = TokenDataset(texts, np.array([2, 1]), labels=np.array([7, 8, 9]))
    assert len(dataset) == 2
    assert [sample["label"] for sample in (dataset[0], dataset[1])] == [9, 8]
    assert dataset[1]["input_ids"].tolist() == minilm("two films")["input_ids"]
    assert "label" not in TokenDataset(texts, [0])[0]


def write_tokenizer(folder, **special):
    rules = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "<end>": 2}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=rules, **special).save_pretrained(folder)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    write_tokenizer(tmp_path, eos_token="<end>")
    assert load_tokenizer(tmp_path).pad_token_id == 2


def test_a_tokenizer_with_nothing_to_pad_with(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(DataError, match="has no token to pad with"):
        load_tokenizer(tmp_path)


def test_no_such_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"There is no tokenizer `.*nothing`"):
        load_tokenizer(tmp_path / "nothing")


def test_the_fingerprint_of_a_dataset_tells_other_rows_labels_and_texts_apart():
    texts = TokenizedTexts(np.arange(9, dtype=np.int32), np.array([0, 2, 5, 9]))
    shifted = TokenizedTexts(np.arange(9, dtype=np.int32), np.array([0, 3, 5, 9]))
    other = TokenizedTexts(np.arange(1, 10, dtype=np.int32), texts.offsets)
    labels = [0, 1, 0]
    found = [
        TokenDataset(*each).fingerprint()
        for each in (
            (texts, [0, 1], labels),
            (texts, [0, 2], labels),
            (texts, [0, 1], [0, 1, 1]),
            (texts, [0, 1]),
            (shifted, [0, 1], labels),
            (other, [0, 1], labels),
        )
    ]
    assert len(set(found)) == 6
    assert TokenDataset(texts, np.array([0, 1], np.int32), np.array(labels)).fingerprint() == found[0]
