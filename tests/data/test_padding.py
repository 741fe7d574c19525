"""The collator pads as transformers' own does."""

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from lightning_tricks.data.packages import minilm_folder
from lightning_tricks.data.padding import PadToLongest

ROWS = [[101, 7, 8, 102], [101, 102], [101, 9, 102]]


def test_equals_the_collator_of_transformers():
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    features = [{"input_ids": row, "attention_mask": [1] * len(row), "label": i} for i, row in enumerate(ROWS)]
    expected = DataCollatorWithPadding(tokenizer)(features)
    samples = [{"input_ids": np.array(row, np.int32), "label": i} for i, row in enumerate(ROWS)]
    found = PadToLongest(tokenizer.pad_token_id)(samples)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(expected, torch.int64)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_samples_without_labels_and_another_padding():
    found = PadToLongest(3)([{"input_ids": row} for row in ROWS])
    assert sorted(found) == ["attention_mask", "input_ids"]
    assert found["input_ids"][1].tolist() == [101, 102, 3, 3]
