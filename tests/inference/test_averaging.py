"""Averaging checkpoints: what the file holds, what is refused by name, and that members are never touched."""

import resource
import subprocess
import sys

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from lightning_tricks.engines import read_checkpoint
from lightning_tricks.errors import CheckpointError, DataError, DegradedWarning, MisconfigurationError
from lightning_tricks.inference import average_checkpoints
from lightning_tricks.storage import WeightsFile


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(4, 3, generator=generator).to(dtype),
        "b": torch.randn(3, generator=generator).to(dtype),
        "count": torch.tensor(seed),
        "mask": torch.tensor([seed % 2 == 0]),
    }


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("weights", [None, [1, 0, 3, 0.5]])
def test_is_the_weighted_mean(save, tmp_path, suffix, weights):
    paths = [save(f"{seed}", tensors(seed), global_step=seed) for seed in range(4)]
    done = average_checkpoints(paths, tmp_path / f"mean.{suffix}", weights=weights)
    state = read_checkpoint(done.path)["state_dict"]
    w = torch.tensor(weights or [1.0] * 4, dtype=torch.float64)
    for name in ("w", "b"):
        stacked = torch.stack([tensors(seed)[name].double() for seed in range(4)])
        expected = torch.einsum("k,k...->...", w / w.sum(), stacked)
        torch.testing.assert_close(state[name], expected.float(), rtol=3e-7, atol=3e-7)
    assert (state["count"].item(), state["mask"].item()) == (3, False)
    assert done.members == tuple(path for path, share in zip(paths, w, strict=True) if share > 0)
    assert done.skipped == {}


def test_a_member_of_weight_0_is_checked_and_not_read(save, tmp_path):
    """NaN times 0 is NaN, and its counts would win for being the newest."""
    spoilt = {**tensors(9), "w": torch.full((4, 3), float("nan"))}
    paths = [save("good", tensors(1), global_step=1), save("spoilt", spoilt, global_step=9)]
    done = average_checkpoints(paths, tmp_path / "mean.ckpt", weights=[1, 0])
    file = torch.load(done.path, weights_only=True)
    assert torch.equal(file["state_dict"]["w"], tensors(1)["w"])
    assert (file["state_dict"]["count"].item(), file["global_step"], done.members) == (1, 1, (paths[0],))
    with pytest.raises(CheckpointError, match=r"odd\.ckpt.*`w` is absent"):
        average_checkpoints([paths[0], save("odd", {"x": torch.ones(1)})], tmp_path / "m.ckpt", weights=[1, 0])


def test_integers_and_hyper_parameters_come_from_the_newest_whatever_the_order(save, tmp_path):
    rest = [{"global_step": step, "epoch": step, "hyper_parameters": {"lr": step}} for step in (7, 9, 2)]
    paths = [save(f"{seed}", tensors(seed), **rest[seed]) for seed in range(3)]
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    file = torch.load(tmp_path / "mean.ckpt", weights_only=True)
    assert (file["state_dict"]["count"].item(), file["global_step"], file["hyper_parameters"]) == (1, 9, {"lr": 9})
    assert [member["file"] for member in file["lightning_tricks"]["average"]] == [path.name for path in paths]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_members_keep_their_dtype(save, read, tmp_path, dtype):
    paths = [save(f"{seed}", tensors(seed, dtype)) for seed in range(3)]
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    stacked = torch.stack([tensors(seed, dtype)["w"].double() for seed in range(3)])
    assert torch.equal(read(tmp_path / "mean.ckpt")["w"], stacked.mean(0).to(dtype))


def test_compiled_or_not_is_the_same(save, read, tmp_path):
    paths = [save("plain", {"net.w": torch.ones(2)}), save("compiled", {"net._orig_mod.w": 3 * torch.ones(2)})]
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    assert torch.equal(read(tmp_path / "mean.ckpt")["net.w"], torch.tensor([2.0, 2.0]))


def test_safetensors_members(tmp_path, save):
    average_checkpoints([save("a", tensors(0))], tmp_path / "a.safetensors")
    average_checkpoints([save("b", tensors(1))], tmp_path / "b.safetensors")
    average_checkpoints([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "mean.safetensors")
    mean = (tensors(0)["w"].double() + tensors(1)["w"].double()) / 2
    assert torch.equal(WeightsFile(tmp_path / "mean.safetensors").tensor("w"), mean.float())


class Module(L.LightningModule):
    def __init__(self, config=None, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 2)

    def test_step(self, batch, index):
        self.log("sum", self.layer(batch).sum(), batch_size=1)


def test_the_file_loads_strictly_and_tests(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = Module(config=OmegaConf.create({"labels": ["a"]}))
        states.append(module.state_dict())
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / f"{seed}.ckpt")
    average_checkpoints([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], tmp_path / "mean.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "mean.ckpt", strict=True, weights_only=False)
    mean = (states[0]["layer.weight"].double() + states[1]["layer.weight"].double()) / 2
    assert torch.equal(loaded.layer.weight, mean.float())
    assert loaded.hparams.config.labels == ["a"]
    [found] = trainer.test(loaded, torch.ones(1, 3), verbose=False)
    assert found["sum"] == pytest.approx(loaded.layer(torch.ones(3)).sum().item())


# -- refused by name ---------------------------------------------------------------------------------------------------

OTHERS = {
    "a shape": ({"w": torch.ones(2, 3)}, {}, r"`w` is float32 of shape \[2, 3\] in the one and float32 of shape \[4"),
    "a dtype": ({"w": torch.ones(4, 3).half()}, {}, "`w` is float16"),
    "a name too many": ({"x": torch.ones(1)}, {}, "`x` is float32 of shape .* in the one and absent in the other"),
    "labels": ({}, {"hyper_parameters": {"labels": ["b", "a"]}}, r"`labels` is \['b', 'a'\].*ignore=\['labels'\]"),
    "data": ({}, {"datamodule_hyper_parameters": {"tokenizer": "y"}}, "`tokenizer` is 'y' in the one and 'x'"),
    "an average": ({}, {"averaging_state": {"n_averaged": 3}}, "holds a running average of the weights"),
    "the suite's average": ({}, {"lightning_tricks": {"averaged": {"updates": "3"}}}, "holds a running average"),
    "two sets of ours": (
        {},
        {"lightning_tricks": {"values": {"WeightAveraging{'policy': 'EMA'}#0": {"w": torch.ones(4, 3)}}}},
        "full checkpoint of a run with WeightAveraging.*two sets of weights.*save_weights_only=True.*consolidate",
    ),
    "two sets": ({}, {"state_dict_ema": {}}, "two sets of weights, `state_dict` and `state_dict_ema`"),
    "base": ({}, {"lightning_tricks": {"base": {"e.w": {"shape": "1", "float32": "00"}}}}, "different frozen.*`e.w`"),
}
GOOD = {"hyper_parameters": {"labels": ["a", "b"]}, "datamodule_hyper_parameters": {"tokenizer": "x"}}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_member_that_does_not_match_is_refused_or_skipped(save, tmp_path, kind):
    state, rest, message = OTHERS[kind]
    paths = [save("good", tensors(0), **GOOD), save("odd", {**tensors(1), **state}, **{**GOOD, **rest})]
    before = [path.read_bytes() for path in paths]
    with pytest.raises(CheckpointError, match=message) as raised:
        average_checkpoints(paths, tmp_path / "mean.ckpt")
    assert "odd.ckpt" in str(raised.value)
    assert [path.read_bytes() for path in paths] == before
    assert not (tmp_path / "mean.ckpt").exists()
    third = save("third", tensors(2), **GOOD)
    done = average_checkpoints([*paths, third], tmp_path / "mean.ckpt", weights=[1, 5, 1], skip_bad=True)
    assert done.members == (paths[0], third)
    assert "odd.ckpt" in done.skipped[paths[1]]
    mean = (tensors(0)["w"].double() + tensors(2)["w"].double()) / 2
    torch.testing.assert_close(read_checkpoint(done.path)["state_dict"]["w"], mean.float())


@pytest.mark.parametrize("cut", [1, 100, 2000])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_truncated_member_is_named(save, tmp_path, cut, suffix):
    paths = []
    for seed in range(3):
        paths.append(tmp_path / f"{seed}.{suffix}")
        average_checkpoints([save("made", {"w": torch.full((600,), float(seed))})], paths[-1])
    paths[1].write_bytes(paths[1].read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=rf"1\.{suffix}"):
        average_checkpoints(paths, tmp_path / "mean.ckpt")
    done = average_checkpoints(paths, tmp_path / "mean.ckpt", skip_bad=True)
    assert list(done.skipped) == [paths[1]]
    assert torch.equal(read_checkpoint(done.path)["state_dict"]["w"], torch.ones(600))


def test_ignored_hyper_parameters_may_differ(save, tmp_path):
    paths = [save(str(seed), tensors(seed), hyper_parameters={"name": f"run {seed}"}) for seed in range(2)]
    average_checkpoints(paths, tmp_path / "mean.ckpt", ignore=["name"])
    assert (tmp_path / "mean.ckpt").exists()


def test_the_same_labels_of_another_type_are_the_same(save, tmp_path):
    kinds = [["a", "b"], ("a", "b"), OmegaConf.create(["a", "b"])]
    paths = [save(str(n), tensors(n), hyper_parameters={"labels": kind}) for n, kind in enumerate(kinds)]
    assert len(average_checkpoints(paths, tmp_path / "mean.ckpt").members) == 3


def test_running_averages_among_themselves_are_averaged(save, read, tmp_path):
    rest = {"averaging_state": {"n_averaged": torch.tensor(3)}, "current_model_state": {"w": torch.zeros(1)}}
    paths = [save(str(value), {"w": torch.tensor([value])}, **rest) for value in (1.0, 2.0)]
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    assert read(tmp_path / "mean.ckpt")["w"].item() == 1.5


def test_too_few_are_left(save, tmp_path):
    paths = [save("a", tensors(0)), save("b", {"x": torch.ones(1)})]
    with pytest.raises(CheckpointError, match=r"fewer than two.*b\.ckpt"):
        average_checkpoints(paths, tmp_path / "mean.ckpt", skip_bad=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "`weights` has 1 entries for 2"),
        ({"weights": [1.0, -1.0]}, r"0 or more.*-1\.0"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"batches": 0}, "`batches`.*got 0"),
        ({"loader": [1]}, "`loader` is given without `module`"),
    ],
)
def test_bad_options(save, tmp_path, options, message):
    with pytest.raises(MisconfigurationError, match=message):
        average_checkpoints([save("a", tensors(0)), save("b", tensors(1))], tmp_path / "mean.ckpt", **options)


def test_bad_paths(save, tmp_path):
    path = save("a", tensors(0))
    (tmp_path / "empty").mkdir()
    for paths, out, error, message in [
        ([], "mean.ckpt", MisconfigurationError, "empty list"),
        (path, "mean.ckpt", MisconfigurationError, "several checkpoints, got one"),
        ([path], "a.ckpt", MisconfigurationError, "one of the members"),
        ([path], "mean.bin", MisconfigurationError, r"\.ckpt or \.safetensors"),
        ([tmp_path / "none.ckpt"], "mean.ckpt", CheckpointError, "no checkpoint .*none.ckpt"),
        ([tmp_path / "empty"], "mean.ckpt", CheckpointError, "empty is a folder that neither"),
    ]:
        with pytest.raises(error, match=message):
            average_checkpoints(paths, tmp_path / out)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_a_full_disk_leaves_what_was_there(save, tmp_path, suffix):
    paths = [save(str(seed), {"w": torch.full((4000,), float(seed))}) for seed in range(2)]
    out = tmp_path / f"mean.{suffix}"
    average_checkpoints(paths[:1], out)
    before, limits = out.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"mean.{suffix} could not be saved"):
            average_checkpoints(paths, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, sys
import lightning_tricks.engines._average as average
from lightning_tricks.inference import average_checkpoints
mean, calls = average.weighted_mean, []
def dying(*arguments):
    calls.append(1)
    if len(calls) == 2:
        HOW
    return mean(*arguments)
average.weighted_mean = dying
average_checkpoints(sys.argv[2:], sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "raise KeyboardInterrupt"])
def test_killed_while_averaging_leaves_every_member_intact(save, tmp_path, how):
    paths = [save(str(seed), tensors(seed)) for seed in range(3)]
    before = [path.read_bytes() for path in paths]
    arguments = [str(path) for path in (tmp_path / "mean.ckpt", *paths)]
    run = subprocess.run([sys.executable, "-c", KILLED.replace("HOW", how), *arguments], capture_output=True)
    assert run.returncode != 0
    assert not (tmp_path / "mean.ckpt").exists()
    assert [path.read_bytes() for path in paths] == before
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    assert len(read_checkpoint(tmp_path / "mean.ckpt")["state_dict"]) == 4


# -- running statistics ------------------------------------------------------------------------------------------------


def normed(seed):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net(torch.randn(9, 3))
    return net


def batches():
    return [(torch.randn(8, 3, generator=torch.Generator().manual_seed(n)), torch.zeros(8)) for n in range(5)]


def test_statistics_are_averaged_with_a_warning(save, read, tmp_path):
    nets = [normed(seed) for seed in range(2)]
    paths = [save(str(n), net.state_dict()) for n, net in enumerate(nets)]
    with pytest.warns(DegradedWarning, match=r"`1\.running_mean`.*`loader=`"):
        average_checkpoints(paths, tmp_path / "mean.ckpt")
    mean = (nets[0][1].running_mean.double() + nets[1][1].running_mean.double()) / 2
    torch.testing.assert_close(read(tmp_path / "mean.ckpt")["1.running_mean"], mean.float())


@pytest.mark.parametrize("limit", [5, 2])
def test_statistics_are_computed_anew_as_torch_does(save, tmp_path, read, limit):
    nets = [normed(seed) for seed in range(2)]
    paths = [save(str(n), net.state_dict()) for n, net in enumerate(nets)]
    scratch = normed(5)
    before = {name: value.clone() for name, value in scratch.state_dict().items()}
    average_checkpoints(paths, tmp_path / "mean.ckpt", module=scratch, loader=batches(), batches=limit)
    expected = normed(6)
    expected.load_state_dict(
        {n: (v + nets[1].state_dict()[n]) / 2 if v.is_floating_point() else v for n, v in nets[0].state_dict().items()}
    )
    torch.optim.swa_utils.update_bn(batches()[:limit], expected)
    state = read(tmp_path / "mean.ckpt")
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value)
    assert all(torch.equal(value, before[name]) for name, value in scratch.state_dict().items())
    assert not list(tmp_path.glob(".*"))


def test_no_data_for_statistics(save, tmp_path):
    paths = [save(str(n), normed(n).state_dict()) for n in range(2)]
    with pytest.raises(DataError, match="gave no batch"):
        average_checkpoints(paths, tmp_path / "mean.ckpt", module=normed(0), loader=[])
    assert not (tmp_path / "mean.ckpt").exists()
    assert not list(tmp_path.glob(".*"))
