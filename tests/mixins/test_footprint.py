"""trainable_report: counts and bytes, by the formulas, and told when a fit begins."""

import logging

import pytest
import torch
from torch import nn

from lightning_tricks.mixins import LoRA, TrainableReport, trainable_report
from tests.mixins.models import QUIET, Classifier, Holder, trainer

pytestmark = QUIET


def test_counts_and_bytes_are_those_of_the_formulas():
    net = nn.Sequential(nn.Linear(10, 10, bias=False).bfloat16().requires_grad_(False), nn.Linear(10, 2))
    assert trainable_report(net) == TrainableReport(
        trained=22, total=122, weights=200 + 88, gradients=(88, 288), optimizer=(22 * 8, 122 * 8)
    )
    assert trainable_report(net).share == pytest.approx(22 / 122)


def test_tied_parameters_count_once():
    net = nn.ModuleDict({"table": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    net["out"].weight = net["table"].weight
    assert trainable_report(net).total == 20


def test_the_moments_are_what_adam_keeps():
    net = nn.Linear(30, 20)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    assert trainable_report(net).optimizer == (kept, kept)


def test_is_told_when_a_fit_begins(caplog):
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        trainer(max_steps=1).fit(model := Classifier())
    assert f"Classifier: {trainable_report(model)}" in caplog.text


def test_a_module_without_parameters():
    assert trainable_report(nn.ReLU()).share == 0


def test_gpt2_medium_has_the_papers_count():
    """Rank 4 on q and v; the model is built without values, which no count needs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    with torch.device("meta"):
        net = transformers.GPT2Model(config)
    model = Holder(net.to_empty(device="cpu"), LoRA(rank=4, targets=("c_attn:q,v",)))
    report = trainable_report(model)
    assert report.trained == 393_216
    assert report.total == 354_823_168 + 393_216
