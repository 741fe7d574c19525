"""Hybrid sharding on two real processes, and on four that believe to be on two machines."""

import pytest

from lightning_tricks.engines import FSDP2Strategy
from lightning_tricks.engines._replicas import count_replicas
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.strategies import fsdp2
from tests.conformance.engines import Group

JOBS = "tests.engines.hybrid_jobs"

# Checks that compare with one device come after it: `reference` writes what they compare with.
CHECKS = [
    "twenty_steps",
    "accumulation",
    "clipping",
    "group_norms",
    "scaled_gradients",
    "weights_file",
    "frozen",
    "fitted_again",
    "vetoed",
    "vetoed_scaled",
    "shards_swapped",
    "shards_misfit",
    "shards_after_test",
    "resume",
    "read",
    "single_file",
]
ON_FOUR = ["twenty_steps", "accumulation", "group_norms", "vetoed", "shards_swapped", "weights_file", "resume", "read"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where one device has left its references."""
    folder = tmp_path_factory.mktemp("hybrid")
    group = Group(1, folder / "one", f"{JOBS}:prepare")
    group.call(f"{JOBS}:reference", folder=f"{folder}", names=CHECKS, limit=120.0)
    group.close()
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """Run a job on two ranks."""
    group = Group(2, folder / "two", f"{JOBS}:prepare")
    yield lambda job, **arguments: group.call(f"{JOBS}:{job}", folder=f"{folder}", **arguments)
    group.close()


@pytest.fixture(scope="module")
def four(folder):
    """Run a job on four ranks, two on each of two machines: this machine's cores are enough for those of one."""
    group = Group(4, folder / "four", f"{JOBS}:prepare", nodes=2)
    yield lambda job, **arguments: group.call(f"{JOBS}:{job}", folder=f"{folder}", nodes=2, **arguments)
    group.close()


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_two_copies_on_two_ranks_do_what_one_device_does(two, check):
    two("check", name=check)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["laid_out", "other_replicas", "refusals"])
def test_two_copies_on_two_ranks(two, job):
    two(job)


@pytest.mark.slow
@pytest.mark.parametrize("check", ON_FOUR)
def test_two_copies_on_four_ranks_do_what_one_device_does(four, check):
    four("check", name=check)


@pytest.mark.slow
def test_two_copies_on_four_ranks(four):
    four("laid_out")


@pytest.mark.parametrize("value", [0, -2, True, 1.5, "node", None])
def test_replicate_is_a_count_or_nodes(value):
    with pytest.raises(MisconfigurationError, match="`replicate` must be 'nodes' or a whole number of 1 or more, got"):
        FSDP2Strategy(replicate=value)


def test_replicas_are_counted():
    assert [count_replicas(value, nodes=2, ranks=8) for value in ("nodes", 1, 4, 8)] == [2, 1, 4, 8]
    with pytest.raises(MisconfigurationError, match=r"`replicate=3` does not divide the 8 ranks .* 1 or 2 or 4 or 8\."):
        count_replicas(3, nodes=1, ranks=8)
    assert fsdp2(replicate=2).replicate == 2
