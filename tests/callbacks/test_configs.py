"""Every callback and policy can be written in a config file."""

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lightning_tricks.callbacks import (
    EMA,
    LAWA,
    SWA,
    CheckpointEnsemble,
    EarlyStopping,
    FixedNorm,
    GradientClipping,
    Percentile,
    Steps,
    TopK,
    UnitwiseAdaptive,
    Value,
    Watch,
    ZScore,
)


def parsed(name, **init_args):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    config = {"class_path": f"lightning_tricks.callbacks.{name}", "init_args": init_args}
    return parser.instantiate(parser.parse_object({"callback": config})).callback


def test_early_stopping():
    callback = parsed("EarlyStopping", monitor="val/accuracy", patience=5)
    assert isinstance(callback, EarlyStopping)
    assert (callback.mode, callback.patience) == ("max", 5)


@pytest.mark.parametrize(
    "policy", [2.0, {"class_path": "lightning_tricks.callbacks.FixedNorm", "init_args": {"limit": 2.0}}]
)
def test_gradient_clipping(policy):
    callback = parsed("GradientClipping", policy=policy)
    assert isinstance(callback, GradientClipping)
    assert repr(callback.policy) == repr(FixedNorm(2.0))


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("Percentile", {"q": 90.0, "window": 500}, Percentile(90.0, window=500)),
        ("Value", {"limit": 0.25}, Value(0.25)),
        ("UnitwiseAdaptive", {"ratio": 0.02, "exclude": ["head"]}, UnitwiseAdaptive(0.02, exclude=["head"])),
        ("ZScore", {"threshold": 3.0, "warmup_limit": 1.0}, ZScore(3.0, warmup_limit=1.0)),
    ],
)
def test_policies_that_learn(name, options, wanted):
    policy = {"class_path": f"lightning_tricks.callbacks.{name}", "init_args": options}
    assert repr(parsed("GradientClipping", policy=policy).policy) == repr(wanted)


def test_checkpoint_ensemble():
    callback = parsed("CheckpointEnsemble", members={"k": 5, "monitor": "val/accuracy"})
    assert isinstance(callback, CheckpointEnsemble)
    assert callback.members == TopK(5, monitor="val/accuracy")


def test_defaults_are_ready_to_use():
    assert parsed("CheckpointEnsemble").members == TopK(3, monitor="val/loss")
    assert parsed("EarlyStopping").mode == "min"
    assert repr(parsed("GradientClipping").policy) == "FixedNorm(limit=1.0)"


def test_non_finite_guard():
    assert parsed("NonFiniteGuard", max_skips=2).max_skips == 2
    assert parsed("NonFiniteGuard", dirpath="folder").dirpath == "folder"


@pytest.mark.parametrize("groups", [{"top": "head"}, {"top": "head", "all": "*"}])
def test_gradient_norm_monitor(groups):
    assert parsed("GradientNormMonitor", groups=groups).groups == groups
    assert parsed("GradientNormMonitor", groups=["head"], every_n_steps=5).groups == {"head": "head"}
    assert parsed("GradientNormMonitor").groups == {}


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("EMA", {"decay": 0.99, "warmup": 0}, EMA(0.99, warmup=0)),
        ("SWA", {"start": 0.5}, SWA(start=0.5)),
        ("SWA", {"start": 100}, SWA(start=100)),
        ("LAWA", {"k": 3}, LAWA(k=3)),
    ],
)
def test_weight_averaging(name, options, wanted):
    policy = {"class_path": f"lightning_tricks.callbacks.{name}", "init_args": options}
    callback = parsed("WeightAveraging", policy=policy, update_every=10, use_for=["result"])
    assert (callback.policy, callback.update_every, callback.use_for) == (wanted, 10, ("result",))
    assert parsed("WeightAveraging", update_every="epoch").policy == EMA()


def test_limits_for_parts_of_the_model():
    percentile = {"class_path": "lightning_tricks.callbacks.Percentile", "init_args": {"q": 90.0}}
    policy = parsed("GradientClipping", policy={"encoder.*": 1.0, "head": percentile}).policy
    assert {part: repr(each) for part, each in policy.items()} == {
        "encoder.*": repr(FixedNorm(1.0)),
        "head": repr(Percentile(90.0)),
    }


def test_early_stopping_with_policies():
    base = "lightning_tricks.callbacks"
    watch = {"class_path": f"{base}.Watch", "init_args": {"monitor": "val/f1", "smoothing": 0.5}}
    patience = {"class_path": f"{base}.Steps", "init_args": {"n": 2000}}
    callback = parsed("EarlyStopping", monitor=["val/loss", watch], patience=patience, stop_when="all")
    assert callback.patience == Steps(2000)
    assert callback._watches == [Watch("val/loss"), Watch("val/f1", smoothing=0.5)]
    assert parsed("EarlyStopping", monitor=watch).monitor == "val/f1"
