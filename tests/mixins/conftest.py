"""Every test here draws the same random numbers each time; those of engines share what processes are ready for."""

import pytest
import torch

from tests.conformance.engines import Group


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    group = Group(2, tmp_path_factory.mktemp("group"), prepare="tests.mixins.jobs:quiet")
    yield group
    group.close()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    group = Group(1, tmp_path_factory.mktemp("one_device"), prepare="tests.mixins.jobs:quiet")
    yield group
    group.close()
