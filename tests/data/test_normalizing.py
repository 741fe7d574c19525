"""FeatureNormalizer against scikit-learn and SciPy, merged over ranks, kept in checkpoints."""

import lightning as L
import numpy as np
import pytest
import torch
from sklearn import preprocessing

from lightning_tricks.data import FeatureNormalizer, TricksDataLoader, normalizing
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional.power import best_power, power_inverse, power_transform
from tests.trainers import quiet_trainer

GENERATOR = torch.Generator().manual_seed(0)
SKEWED = torch.randn(4000, 3, generator=GENERATOR, dtype=torch.float64).mul(torch.tensor([1.0, 0.5, 2.0])).exp()
SKEWED = SKEWED * torch.tensor([1.0, 100.0, -1.0]) + torch.tensor([0.0, 50.0, 3.0])
PEERS = {
    "standard": preprocessing.StandardScaler(),
    "minmax": preprocessing.MinMaxScaler(),
    "robust": preprocessing.RobustScaler(),
    "power": preprocessing.PowerTransformer(),
}
# Quantiles are those of a sketch of at most 1% of a rank; a power is that of 999 of them.
TOLERANCE = {"standard": 1e-9, "minmax": 1e-9, "robust": 0.03, "power": 0.1}


def rows(missing=False):
    data = SKEWED.clone()
    if missing:
        data[torch.rand(data.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = torch.nan
    return data


def with_constant(data):
    return torch.cat([data, torch.full((len(data), 1), 7.0, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", PEERS)
def test_as_scikit_learn(kind, missing):
    data = rows(missing)
    expected = torch.from_numpy(PEERS[kind].fit_transform(data.numpy()))
    found = FeatureNormalizer(3, kind=kind).fit(data.split(37))(data)
    middle = (expected.abs() < 2) & ~expected.isnan()
    assert (found - expected)[middle].abs().max() < TOLERANCE[kind]
    assert (found[expected.isnan()] == 0).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", PEERS)
def test_the_inverse_brings_values_back(kind):
    data = with_constant(rows())
    normalizer = FeatureNormalizer(4, kind=kind).fit([data])
    assert torch.allclose(normalizer.inverse(normalizer(data)), data, rtol=1e-8)
    assert (normalizer(data)[:, 3] == 0).all()
    assert normalizer(data.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", PEERS)
def test_ranks_are_merged(kind, monkeypatch):
    """Each rank's own statistics are sent round; the outcome is that of one pass over all rows."""
    data, sent = rows(missing=True), []
    parts = (data[:1], data[1:2500], data[2500:])
    with monkeypatch.context() as patch:
        patch.setattr(normalizing, "gather_over_ranks", lambda value: sent.append(value) or [value])
        for part in (parts[0].nan_to_num(1.0), *parts[1:]):
            FeatureNormalizer(3, kind=kind).fit([part])
    monkeypatch.setattr(normalizing, "gather_over_ranks", lambda value: sent)
    merged = FeatureNormalizer(3, kind=kind).fit([])
    whole = torch.cat([parts[0].nan_to_num(1.0), *parts[1:]])
    monkeypatch.setattr(normalizing, "gather_over_ranks", lambda value: [value])
    alone = FeatureNormalizer(3, kind=kind).fit([whole])
    moderate = whole[(whole - whole.nanmedian(0).values).abs().amax(1) < 1]
    assert torch.allclose(merged(moderate), alone(moderate), atol=1e-9 if kind in ("standard", "minmax") else 0.05)


def test_a_far_mean_loses_no_precision():
    data = torch.randn(20_000, 2, generator=GENERATOR, dtype=torch.float64) * 1e-3 + 1e6
    found = FeatureNormalizer(2).fit(data.split(100))(data)
    assert abs(found.std(0, correction=0) - 1).max() < 1e-6
    assert found.mean(0).abs().max() < 1e-6


@pytest.mark.parametrize("kind", PEERS)
def test_times_in_seconds(kind):
    """Near 1.7e9, where fp32 knows only every 128th second."""
    data = torch.randn(5000, 1, generator=GENERATOR, dtype=torch.float64) * 60 + 1.7e9
    expected = torch.from_numpy(preprocessing.RobustScaler().fit_transform(data.numpy()))
    normalizer = FeatureNormalizer(1, kind=kind).fit(data.split(100))
    found = normalizer(data)
    assert torch.allclose(normalizer.inverse(found), data, rtol=0, atol=1)
    if kind == "robust":
        assert (found - expected).abs().max() < 0.05
    if kind in ("standard", "power"):
        assert found.mean().abs() < 0.02
        assert abs(found.std() - 1) < 0.02
    assert (found.flatten()[data.flatten().argsort()].diff() > -1e-6).all()


def test_a_skewed_feature_far_away_has_the_power_that_it_would_have_here():
    here = rows()[:, :1]
    there = here + 1.7e9
    middle = here - here.median()
    expected = torch.from_numpy(preprocessing.PowerTransformer().fit_transform(middle.numpy()))
    normalizer = FeatureNormalizer(1, kind="power").fit(there.split(100))
    found = normalizer(there)
    assert (found - expected)[expected.abs() < 2].abs().max() < TOLERANCE["power"]
    assert torch.allclose(normalizer.inverse(found), there, rtol=0, atol=1e-5)


def test_statistics_survive_a_checkpoint_and_a_cast():
    data = rows()
    fitted = FeatureNormalizer(3, kind="power").fit([data])
    expected = fitted(data)
    other = FeatureNormalizer(3, kind="power")
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.bfloat16()(data), expected)


class Table(L.LightningDataModule):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        return TricksDataLoader(self.rows, batch_size=500, shuffle=True, seed=0)


class Regression(L.LightningModule):
    """As the card shows it."""

    def __init__(self):
        super().__init__()
        self.normalizer = FeatureNormalizer(3)
        self.layer = torch.nn.Linear(3, 1, dtype=torch.float64)

    def setup(self, stage):
        if stage == "fit":
            self.normalizer.fit(self.trainer.datamodule.train_dataloader())

    def training_step(self, batch):
        return self.layer(self.normalizer(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_resume_goes_on_with_the_checkpoint_s_statistics(tmp_path):
    first = Regression()
    assert not first.normalizer.fitted
    run = quiet_trainer(tmp_path, max_epochs=1)
    run.fit(first, datamodule=Table(rows()))
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.allclose(first.normalizer(rows()).std(0, correction=0), torch.ones(3, dtype=torch.float64))
    resumed = Regression()
    quiet_trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=Table(rows() * 7), ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(resumed.normalizer.statistics, first.normalizer.statistics)
    loaded = Regression.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert loaded.normalizer.fitted
    assert torch.equal(loaded.normalizer(rows()), first.normalizer(rows()))


class Normalizing:
    """A collator that normalises, in a worker."""

    def __init__(self, normalizer):
        self.normalizer = normalizer

    def __call__(self, samples):
        return self.normalizer(torch.stack(samples)), torch.utils.data.get_worker_info() is not None


@pytest.mark.slow
def test_in_a_collator_with_workers():
    data = rows(missing=True)
    normalizer = FeatureNormalizer(3, kind="robust").fit([data])
    loader = TricksDataLoader(
        data, batch_size=1000, shuffle=False, seed=0, num_workers=2, collate_fn=Normalizing(normalizer)
    )
    batches = list(loader)
    assert all(in_worker for _, in_worker in batches)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), normalizer(data))


def test_a_batch_may_have_any_number_of_dimensions():
    data = rows()
    normalizer = FeatureNormalizer(3).fit([data.view(40, 100, 3)])
    assert torch.equal(normalizer(data.view(40, 100, 3)).view(-1, 3), FeatureNormalizer(3).fit([data])(data))


@pytest.mark.parametrize("power", [-1.5, 0.0, 0.7, 1.0, 2.0, 3.5])
def test_power_against_scipy(power):
    from scipy import stats

    values = np.linspace(-3, 3, 61)
    found = power_transform(torch.from_numpy(values), torch.tensor(power, dtype=torch.float64))
    assert np.allclose(found, stats.yeojohnson(values, power), atol=1e-12)
    assert np.allclose(power_inverse(found, torch.tensor(power, dtype=torch.float64)), values, atol=1e-9)


def test_best_power_against_scipy():
    from scipy import stats

    values = rows()[:, [0, 2]]
    expected = [stats.yeojohnson_normmax(column.numpy()) for column in values.T]
    assert np.allclose(best_power(values), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.ones(2, 2)], r"shape \(2, 2\), whose last dimension is not 3"),
        ([torch.tensor([[1.0, torch.inf, 2.0]])], "Feature 1 has an infinite value"),
        ([], "Feature 0 has no value"),
        ([torch.tensor([[1.0, 2.0, torch.nan]])], "Feature 2 has no value"),
    ],
)
def test_bad_data(batches, message):
    with pytest.raises(DataError, match=message):
        FeatureNormalizer(3).fit(batches)


def test_bad_use(monkeypatch):
    for features, kind, message in ((0, "standard", "`features` must be"), (1, "log", "`kind` must be one of")):
        with pytest.raises(MisconfigurationError, match=message):
            FeatureNormalizer(features, kind=kind)
    with pytest.raises(MisconfigurationError, match="no statistics yet: call `fit`"):
        FeatureNormalizer(3)(torch.ones(1, 3))
    with pytest.raises(MisconfigurationError, match="do not have 3 features"):
        FeatureNormalizer(3)(torch.ones(3, 1))
    monkeypatch.setattr(normalizing, "gather_over_ranks", lambda value: [value, ("a broken disk", value[1])])
    with pytest.raises(DataError, match="Another rank could not read its part: a broken disk"):
        FeatureNormalizer(3).fit([torch.ones(2, 3)])
