"""Class-weighted losses on two processes: recalls of all ranks, plain logits in validation, faults told everywhere."""

import pytest
import torch
from torch.nn import functional as F

from tests.mixins.class_jobs import Validated, validation

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_recalls_and_losses_are_those_of_all_ranks(strategy, group):
    first, second = group.call("tests.mixins.class_jobs:recalls", strategy=strategy)
    assert first == second
    module, (x, y) = Validated(), validation()
    chosen = module.net(x).argmax(1)
    recalls = [float((chosen[y == k] == k).double().mean()) for k in range(3)]
    assert first["untrained"]
    assert first["before"] == pytest.approx(recalls)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(2):  # both ranks train on all ten
        prior = (torch.tensor([50, 30, 20]) / 100).log()
        optimizer.zero_grad()
        F.cross_entropy(module.net(x) + prior, y).backward()
        optimizer.step()
    chosen = module.net(x).argmax(1)
    assert first["after"] == pytest.approx([float((chosen[y == k] == k).double().mean()) for k in range(3)])
    assert first["loss"] == pytest.approx(float(F.cross_entropy(module.net(x), y)), rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_target_that_is_no_class_is_told_on_every_rank(strategy, group):
    other, own = group.call("tests.mixins.class_jobs:a_wrong_target", strategy=strategy)
    assert "sample 3 of the batch has the target 7, which is no class" in own
    assert "a target on another rank is no class: that rank names it" in other
