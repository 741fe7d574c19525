import importlib
import importlib.util

import pytest
import torch
from torch import nn

from lightning_tricks.engines import FSDP2Strategy, ZeroStrategy
from lightning_tricks.engines._blocks import find_blocks
from lightning_tricks.engines._machine import refuse_oversubscription
from lightning_tricks.errors import MisconfigurationError, MissingDependencyError
from tests.engines.checks import Block, Net


class Named(nn.Module):
    """Names its blocks as Hugging Face models do; one lies inside another."""

    _no_split_modules = ("Layer",)

    def __init__(self):
        super().__init__()
        self.layer = Layer(Layer())
        self.head = nn.Linear(2, 2)


class Layer(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.inner = inner


def test_repeated_blocks_are_found():
    net = Net()
    assert find_blocks(net) == list(net.blocks)


def test_named_blocks_win_and_inner_ones_go_with_the_outer():
    named = Named()
    assert find_blocks(named) == [named.layer]
    assert find_blocks(named, ["Linear"]) == [named.layer.linear, named.layer.inner.linear, named.head]


def test_a_block_that_shares_a_weight_with_the_rest_stays_with_the_rest():
    net = Net()
    net.blocks[0].wide.weight = net.blocks[1].wide.weight
    assert find_blocks(net) == []
    assert find_blocks(nn.ModuleList([Block(3), Block(3)])) != []


def test_unknown_block_is_an_error_that_names_the_candidates():
    with pytest.raises(
        MisconfigurationError, match=r"'Blok', which Net does not contain. It contains: Block, LayerNorm"
    ):
        find_blocks(Net(), ["Blok"])


def test_shard_is_a_list():
    with pytest.raises(MisconfigurationError, match=r"write \['Block'\]"):
        FSDP2Strategy(shard="Block")


@pytest.mark.parametrize("stage", [0, 4, "2", True])
def test_stage_must_be_one_to_three(stage):
    with pytest.raises(MisconfigurationError, match="must be 1, 2 or 3"):
        ZeroStrategy(stage=stage)


@pytest.mark.parametrize("size", [0, -1, 1.5, "big", True])
def test_bucket_size_must_be_a_count(size):
    with pytest.raises(MisconfigurationError, match="bucket_size"):
        ZeroStrategy(bucket_size=size)


def test_missing_deepspeed_is_told_with_the_pip_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'lightning-tricks\[deepspeed\]'"):
        ZeroStrategy()


def test_more_processes_than_cores_are_refused():
    strategy = FSDP2Strategy()
    strategy.parallel_devices = [torch.device("cpu")] * 4096

    class Environment:
        def local_rank(self):
            return 0

    strategy.cluster_environment = Environment()
    with pytest.raises(MisconfigurationError, match=r"`devices=4096` asks for 4096 processes, but this machine has"):
        refuse_oversubscription(strategy)
