"""DynamicPaddingCollator: any key, any depth, any dtype."""

import numpy as np
import pytest
import torch

from lightning_tricks.data import DynamicPaddingCollator, LengthBucketSampler, TricksDataLoader
from lightning_tricks.errors import DataError, MisconfigurationError


def test_nested_samples_of_many_makes():
    samples = [
        {"a": {"input_ids": np.array([1, 2], np.int32), "labels": [3, 4]}, "weight": 0.5, "id": "x", "frames": frames}
        for frames in (torch.ones(2, 3), torch.ones(1, 3))
    ]
    samples[1]["a"] = {"input_ids": np.array([7], np.int32), "labels": [8]}
    batch = DynamicPaddingCollator()(samples)
    assert batch["a"]["input_ids"].dtype == torch.int64
    assert batch["a"]["input_ids"].tolist() == [[1, 2], [7, 0]]
    assert batch["a"]["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["a"]["labels"].tolist() == [[3, 4], [8, -100]]
    assert batch["weight"].tolist() == [0.5, 0.5]
    assert batch["id"] == ["x", "x"]
    assert batch["frames"].shape == (2, 2, 3)
    assert batch["frames"][1, 1].tolist() == [0, 0, 0]


def test_labels_of_samples_and_values_by_key():
    collate = DynamicPaddingCollator(fill={"input_ids": 9, "mask": 1.5}, masks={})
    batch = collate(
        [{"input_ids": [1], "labels": 2, "mask": [0.0, 1.0]}, {"input_ids": [1, 2], "labels": 0, "mask": []}]
    )
    assert batch["labels"].tolist() == [2, 0]
    assert batch["input_ids"].tolist() == [[1, 9], [1, 2]]
    assert batch["mask"].tolist() == [[0.0, 1.0], [1.5, 1.5]]
    assert set(batch) == {"labels", "input_ids", "mask"}


def test_a_mask_that_samples_bring_is_kept():
    samples = [{"attention_mask": [1, 0], "input_ids": [1, 2]}, {"attention_mask": [1], "input_ids": [1]}]
    assert DynamicPaddingCollator()(samples)["attention_mask"].tolist() == [[1, 0], [1, 0]]
    turned = [dict(reversed(sample.items())) for sample in samples]
    assert DynamicPaddingCollator()(turned)["attention_mask"].tolist() == [[1, 0], [1, 0]]


def test_lengths_are_rounded_and_cut():
    samples = [{"input_ids": list(range(1, 12))}, {"input_ids": [1]}]
    assert DynamicPaddingCollator(pad_to=8)(samples)["input_ids"].shape == (2, 16)
    assert DynamicPaddingCollator(pad_to=(12, 20))(samples)["input_ids"].shape == (2, 12)
    assert DynamicPaddingCollator(max_length=5)(samples)["input_ids"].shape == (2, 5)


def test_only_tokens_are_rounded_and_cut():
    def sample(tokens):
        ids = list(range(1, tokens + 1))
        text = {"input_ids": ids, "token_type_ids": [0] * tokens, "labels": ids, "features": [1.0] * 10}
        return {"text": text, "tags": [[1.0, 2.0]] * tokens, "labels": [0.0, 1.0, 0.0]}

    for sizes in ((11, 4), (10, 10), (3,)):
        samples = [sample(size) for size in sizes]
        for options, width in (({"pad_to": 8}, -(-max(sizes) // 8) * 8), ({"max_length": 2}, 2)):
            batch = DynamicPaddingCollator(**options)(samples)
            text = {"input_ids", "token_type_ids", "labels", "attention_mask"}
            assert {tuple(batch["text"][key].shape) for key in text} == {(len(sizes), width)}
            assert batch["text"]["features"].shape == (len(sizes), 10)
            assert batch["tags"].shape == (len(sizes), max(sizes), 2)
            if sizes != (3,):  # labels of three classes, as many as tokens: `sequences` tells them apart
                assert batch["labels"].shape == (len(sizes), 3)
            named = DynamicPaddingCollator(**options, sequences={"input_ids", "tags"})(samples)
            assert named["labels"].shape == (len(sizes), 3)
            assert named["text"]["attention_mask"].shape == named["tags"].shape[:2] == (len(sizes), width)
            assert named["text"]["token_type_ids"].shape == (len(sizes), max(sizes))


def test_named_sequences_have_lengths_of_their_own():
    samples = [{"frames": torch.ones(5, 3), "labels": [1] * 9}, {"frames": torch.ones(2, 3), "labels": [2]}]
    batch = DynamicPaddingCollator(pad_to=4, sequences=("frames", "labels"))(samples)
    assert (batch["frames"].shape, batch["labels"].shape) == ((2, 8, 3), (2, 12))
    with pytest.raises(DataError, match=r"samples have none as `input_ids`. Name their keys"):
        DynamicPaddingCollator(pad_to=4)(samples)
    with pytest.raises(MisconfigurationError, match=r"must be keys, such as \('frames',\)"):
        DynamicPaddingCollator(pad_to=4, sequences="frames")


def test_with_a_budget_that_cuts():
    data = [{"input_ids": [1] * length} for length in (3, 30, 5, 4)]
    sampler = LengthBucketSampler([3, 30, 5, 4], max_tokens=16, too_long="truncate", pad_to=8)
    loader = TricksDataLoader(data, sampler=sampler, collate_fn=DynamicPaddingCollator(max_length=16, pad_to=8))
    assert max(batch["input_ids"].numel() for batch in loader) <= 16


@pytest.mark.parametrize(("counted", "padded"), [(1, 8), (8, 1), ((8, 32), 8), (8, (8, 32))])
def test_a_budget_counted_with_other_padding_is_refused(counted, padded):
    data = [{"input_ids": [1] * length} for length in (3, 30, 5, 4)]
    sampler = LengthBucketSampler([3, 30, 5, 4], max_tokens=32, pad_to=counted)
    with pytest.raises(MisconfigurationError, match=r"`pad_to=.*`, but the `collate_fn` pads with `pad_to=.*both the"):
        TricksDataLoader(data, sampler=sampler, collate_fn=DynamicPaddingCollator(pad_to=padded))
    same = DynamicPaddingCollator(pad_to=counted)
    assert max(b["input_ids"].numel() for b in TricksDataLoader(data, sampler=sampler, collate_fn=same)) <= 32
    plain = LengthBucketSampler([3, 30, 5, 4], batch_size=2, pad_to=counted)  # without a budget any padding will do
    TricksDataLoader(data, sampler=plain, collate_fn=DynamicPaddingCollator(pad_to=padded))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}], r"`x` has shapes \(1, 2\), \(1, 3\) in one batch"),
        ([{"x": 1}, {"y": 1}], "not all have `x`"),
        ([{"x": [[1, 2], [3]]}], "`x` of a sample is no tensor: .*Lists within a list must be equally long"),
        ([{"x": np.array(["a"])}], "`x` of a sample is no tensor"),
        ([{"x": 1}, {"x": 1, "y": 2}], "different keys"),
    ],
)
def test_samples_that_do_not_fit_together(samples, message):
    with pytest.raises(DataError, match=message):
        DynamicPaddingCollator()(samples)


def test_bad_options():
    for options in ({"pad_to": 0}, {"max_length": 0}):
        with pytest.raises(MisconfigurationError, match="must be a whole number of at least 1"):
            DynamicPaddingCollator(**options)
