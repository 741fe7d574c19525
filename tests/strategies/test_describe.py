"""Descriptions without a process group: what is said, and what lies where."""

import pytest
import torch
from lightning import Trainer

from lightning_tricks.engines import Bytes, Memory, Precisions
from lightning_tricks.engines._facts import Ledger, within
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.strategies import Description, describe

FP32, BF16 = (torch.float32,), (torch.bfloat16,)


def test_rows_are_aligned_and_say_what_does_not_exist():
    memory = Memory(Bytes(2_000_000), Bytes(0, host=4_000_000), None, None, Bytes(0), {"a": Bytes(500_000)})
    text = str(Description("zero_2", 2, Precisions(BF16, FP32, BF16, BF16, "left as it is"), memory))
    assert text.splitlines() == [
        "engine           zero_2 on 2 ranks",
        "parameters       bf16, 2.0 MB",
        "masters          fp32, 4.0 MB on the host",
        "compute          bf16",
        "reduction        bf16",
        "batch            left as it is",
        "gradients        none at present",
        "optimizer state  none before the first step",
        "buffers          none",
        "engine's own     500.0 kB (a)",
        "all              2.5 MB and 4.0 MB on the host on this rank",
    ]


def test_a_hook_of_ones_own_and_no_masters_are_words_too():
    words = Precisions(FP32, (), (*BF16, *FP32), None, "left as it is").words()
    assert words["masters"] == "the parameters themselves"
    assert words["compute"] == "bf16 and fp32"
    assert words["reduction"] == "its communication hook's"
    assert Precisions(FP32, (), FP32, (), "").words()["reduction"] == "none"


def test_storages_count_once_and_whole_and_where_they_lie():
    whole = torch.zeros(100)
    assert Ledger(torch.device("cpu")).count([whole[:10], whole[50:], torch.zeros(0)]) == Bytes(400)
    assert Ledger(torch.device("cuda")).count([whole]) == Bytes(0, host=400)
    assert Ledger(torch.device("cpu")).count([torch.zeros(5, device="meta")]) == Bytes(0)


def test_a_walk_ends_in_circles_and_at_modules():
    circle = [torch.zeros(3)]
    circle.append(circle)
    assert len(list(within({"a": circle, "b": torch.nn.Linear(2, 2)}, "deepspeed"))) == 1


def test_there_is_nothing_to_describe_before_a_fit():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationError, match=r"one_device does not exist yet.*ask in `on_fit_start` or later"):
        describe(trainer)
