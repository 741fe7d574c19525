"""The clip coefficient against torch, and on norms that are not finite."""

import math

import pytest
import torch

from lightning_tricks.functional import clip_coefficient


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1.0, 50.0])
def test_equals_torch(scale):
    gradient = torch.randn(100, generator=torch.Generator().manual_seed(0)) * scale
    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm=2.0)
    torch.testing.assert_close(gradient * clip_coefficient(norm, 2.0), parameter.grad)


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_leaves_alone_what_it_cannot_scale(norm):
    assert clip_coefficient(torch.tensor(norm), 1.0) == 1.0


def test_never_scales_up():
    assert clip_coefficient(torch.tensor(0.5), 1.0) == 1.0


def test_the_limit_may_be_a_tensor():
    assert clip_coefficient(torch.tensor(4.0), torch.tensor(1.0)) == 0.25
