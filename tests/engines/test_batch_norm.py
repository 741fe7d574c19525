"""Batch normalisation whose weights an engine has made bf16, beside fp32 statistics."""

import pytest
import torch
from torch import nn

from lightning_tricks.engines._batch_norm import normalisations_with_statistics, normalise_in_fp32


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(4))
    for parameter in net.parameters():
        parameter.data = torch.rand_like(parameter).bfloat16()
    return net


@pytest.fixture
def images():
    return torch.randn(5, 3, 4, 4).bfloat16()


def test_torch_refuses_it_and_autocast_does_otherwise(net, images):
    """If this fails, torch can do it by itself, and `_batch_norm.py` may go."""
    with pytest.raises(RuntimeError, match="expected scalar type"):
        net(images)


def test_it_computes_as_autocast_with_fp32_weights(net, images):
    norm, reference = net[0], nn.BatchNorm2d(3)
    reference.load_state_dict({name: value.float() for name, value in norm.state_dict().items()})
    weight = norm.weight
    normalise_in_fp32(net)
    found, expected = norm(images), reference(images)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert torch.equal(norm.running_var, reference.running_var)
    assert norm.weight is weight
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(weight.grad, reference.weight.grad.bfloat16())


def test_the_weights_come_back_after_an_error(net):
    weight, bias = net[0].weight, net[0].bias
    normalise_in_fp32(net)
    with pytest.raises(ValueError, match="expected 4D input"):
        net(torch.randn(5, 3).bfloat16())
    assert net[0].weight is weight
    assert net[0].bias is bias


def test_which_normalisations():
    net = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False), nn.InstanceNorm1d(2), nn.GroupNorm(1, 2)])
    assert normalisations_with_statistics(net) == [net[0]]
