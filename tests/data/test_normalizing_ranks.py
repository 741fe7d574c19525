"""FeatureNormalizer over two real ranks: moments and sketches are merged, and a failure is everybody's."""

import pytest
import torch
from sklearn import preprocessing

from lightning_tricks.data import FeatureNormalizer
from tests.conformance.engines import Group
from tests.data.normalizer_jobs import rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PEERS = {
    "standard": (preprocessing.StandardScaler(), 1e-7),
    "minmax": (preprocessing.MinMaxScaler(), 1e-9),
    "robust": (preprocessing.RobustScaler(), 0.03),
}


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    found = Group(2, tmp_path_factory.mktemp("normalizer"), "tests.data.normalizer_jobs:start")
    yield found
    found.close()


def fitted(group, kind):
    first, second = group.call("tests.data.normalizer_jobs:fit", kind=kind)
    assert first == second
    return torch.tensor(first, dtype=torch.float64)


@pytest.mark.parametrize("kind", PEERS)
def test_as_scikit_learn_on_all_rows(group, kind):
    peer, tolerance = PEERS[kind]
    data = rows()
    expected = torch.from_numpy(peer.fit(data.numpy()).transform(data[:1000].numpy()))
    middle = expected.abs() < 2
    assert (fitted(group, kind) - expected)[middle].abs().max() < tolerance


def test_the_power_of_two_parts_is_that_of_the_whole(group):
    alone = FeatureNormalizer(3, kind="power").fit(rows().split(1000))(rows()[:1000])
    assert (fitted(group, "power") - alone).abs().mean() < 0.03


def test_a_failure_of_one_rank_is_raised_on_both(group):
    first, second = group.call("tests.data.normalizer_jobs:fit_what_is_broken_on_one")
    assert second == "Feature 2 has an infinite value. Make it NaN."
    assert first == f"Another rank could not read its part: {second}"
