"""The greedy soup of checkpoints."""

import math

import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.inference import greedy_soup

VALUES = [0.5, 2.0, 4.5, 9.0, 3.9]


@pytest.fixture
def members(save):
    return [save(str(value), {"w": torch.tensor([value], dtype=torch.float64)}, global_step=3) for value in VALUES]


def error_of(path):
    return abs(torch.load(path, weights_only=True)["state_dict"]["w"].item() - 3.1)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_never_worse_than_its_best_member_and_says_what_it_rejected(members, read, tmp_path, mode):
    sign = 1 if mode == "min" else -1
    soup = greedy_soup(members, lambda path: sign * error_of(path), tmp_path / "soup.ckpt", mode=mode)
    # 3.9 is best; with 2.0 the mean is nearer to 3.1, with 4.5 no longer, nor with 0.5 or 9.0.
    assert [path.stem for path in soup.members] == ["3.9", "2.0"]
    assert {path.stem for path in soup.rejected} == {"0.5", "4.5", "9.0"}
    assert "worse than without it" in soup.rejected[members[0]]
    assert soup.score == sign * error_of(soup.path) == pytest.approx(sign * 0.15)
    assert abs(soup.score) < min(abs(score) for score in soup.scores.values())
    assert read(soup.path)["w"].item() == pytest.approx(2.95)
    assert not list(tmp_path.glob(".*"))


def test_the_same_twice(members, tmp_path):
    files = []
    for name in ("one", "two"):
        greedy_soup(members, error_of, tmp_path / name / "soup.ckpt", mode="min")
        files.append((tmp_path / name / "soup.ckpt").read_bytes())
    assert files[0] == files[1]


def test_nan_never_wins(members, tmp_path):
    def score(path):
        value = torch.load(path, weights_only=True)["state_dict"]["w"].item()
        return math.nan if value > 3.5 else value

    soup = greedy_soup(members, score, tmp_path / "soup.ckpt")
    assert [path.stem for path in soup.members] == ["2.0"]
    assert "nan" in soup.rejected[members[2]]


def test_no_finite_score(members, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint has a finite score"):
        greedy_soup(members, lambda path: math.nan, tmp_path / "soup.ckpt")
    assert not (tmp_path / "soup.ckpt").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_bad_member_is_refused_before_anything_is_scored(members, save, tmp_path):
    def never(path):
        raise AssertionError("scored")

    with pytest.raises(CheckpointError, match=r"odd\.ckpt.*`w`"):
        greedy_soup([*members, save("odd", {"w": torch.ones(2)})], never, tmp_path / "soup.ckpt")


def test_bad_members_are_skipped_if_that_is_wanted(members, save, tmp_path):
    (tmp_path / "cut.ckpt").write_bytes(members[0].read_bytes()[:-40])
    bad = [tmp_path / "cut.ckpt", save("odd", {"w": torch.ones(2)})]
    soup = greedy_soup([bad[0], *members, bad[1]], error_of, tmp_path / "soup.ckpt", mode="min", skip_bad=True)
    assert [path.stem for path in soup.members] == ["3.9", "2.0"]
    assert list(soup.skipped) == bad
    assert "`w`" in soup.skipped[bad[1]]
    assert soup.scores.keys() == set(members)


def normed(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    net(torch.randn(9, 3))
    return net


def test_the_statistics_of_each_mean_are_its_own(save, read, tmp_path):
    """As `torch.optim.swa_utils.update_bn` computes them; a member by itself keeps those that it came with."""
    nets, loader = [normed(seed) for seed in range(3)], [(torch.randn(8, 3) * 5 + 1, 0) for _ in range(4)]
    paths = [save(str(seed), net.state_dict(), global_step=seed) for seed, net in enumerate(nets)]
    scored = []

    def score(path):
        scored.append(read(path))
        return -len(scored) if len(scored) <= 3 else len(scored)  # each mean is better

    options = {"module": normed(7), "loader": loader, "batches": 3}
    soup = greedy_soup(paths, score, tmp_path / "soup.ckpt", **options)
    assert [path.stem for path in soup.members] == ["0", "1", "2"]
    for found, net in zip(scored, nets, strict=False):
        assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
    for found, count in [(scored[3], 2), (scored[4], 3), (read(soup.path), 3)]:
        expected = normed(0)
        states = [net.state_dict() for net in nets[:count]]
        mean = {name: sum(state[name].double() for state in states) / count for name in states[0]}
        expected.load_state_dict(mean)
        torch.optim.swa_utils.update_bn(loader[:3], expected)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_a_loader_must_serve_every_mean(members, tmp_path):
    with pytest.raises(MisconfigurationError, match="`loader` is a generator, which can be read once"):
        greedy_soup(members, error_of, tmp_path / "soup.ckpt", module=normed(0), loader=(b for b in [1]))
    with pytest.raises(MisconfigurationError, match="`loader` is given without `module`"):
        greedy_soup(members, error_of, tmp_path / "soup.ckpt", loader=[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "best"}, "got 'best'"), ({"score": lambda path: "good"}, "must return a number, got 'good'")],
)
def test_bad_options(members, tmp_path, options, message):
    with pytest.raises(MisconfigurationError, match=message):
        greedy_soup(members, **{"score": error_of, "out": tmp_path / "soup.ckpt", **options})


def test_a_member_twice(members, tmp_path):
    with pytest.raises(MisconfigurationError, match="given twice"):
        greedy_soup([*members, members[0]], error_of, tmp_path / "soup.ckpt")
