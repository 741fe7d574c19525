"""Weight averaging on one device: against torch's own, what sees the average, what files hold, and resuming."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tricks.callbacks import (
    EMA,
    LAWA,
    SWA,
    CheckpointEnsemble,
    Cyclic,
    EarlyStopping,
    Every,
    LastK,
    Predictions,
    TopK,
    WeightAveraging,
)
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.engines import consolidate, engine_of
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.inference import average_checkpoints
from lightning_tricks.storage import WeightsFile

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without the ModelCheckpoint
]


@pytest.fixture
def resumable(scripted):
    """The scripted module with a loader that goes on in mid-epoch, a test step, and an optimizer with momentum."""

    class Resumable(scripted):
        def train_dataloader(self):
            return TricksDataLoader(super().train_dataloader().dataset, batch_size=2, shuffle=True, seed=0)

        def test_step(self, batch):
            self.log("test/loss", self.loss(batch), batch_size=4)

        def test_dataloader(self):
            return super().train_dataloader()

    return Resumable


class Trail(Callback):
    """The raw weights after every optimizer step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if len(self.weights) < trainer.global_step:
            self.weights.append(copied(pl_module))


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def ema_of(trail, decay, warmup=0.0):
    """The closed form, in double precision: each weight times the product of the decays after it."""
    found = {name: value.double() for name, value in trail[0].items()}
    for count, weights in enumerate(trail[1:], 1):
        now = min(decay, (1 + count) / (warmup + count)) if warmup else decay
        found = {name: now * found[name] + (1 - now) * weights[name].double() for name in found}
    return found


def close(found, expected, tolerance=1e-6):
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name].double(), expected[name].double(), rtol=tolerance, atol=tolerance) for name in found
    )


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_ema_is_its_closed_form(trainer, resumable, decay, warmup):
    trail, module = Trail(), resumable()
    trainer([WeightAveraging(EMA(decay, warmup=warmup)), trail], max_epochs=3).fit(module)
    assert len(trail.weights) == 12
    assert close(module.state_dict(), ema_of(trail.weights, decay, warmup))


class TorchsAverage(Callback):
    def __init__(self, **options):
        self.options = options

    def on_train_start(self, trainer, pl_module):
        self.model = AveragedModel(pl_module.layer, **self.options)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.model.update_parameters(pl_module.layer)


def test_ema_equals_torchs_averaged_model_in_every_bit(trainer, resumable, same_weights):
    theirs, module = TorchsAverage(multi_avg_fn=get_ema_multi_avg_fn(0.9)), resumable()
    trainer([WeightAveraging(EMA(0.9, warmup=0)), theirs], max_epochs=2).fit(module)
    assert same_weights(module.layer.state_dict(), theirs.model.module.state_dict())


@pytest.mark.parametrize("gamma", [None, 9.0])
def test_ema_is_timms_formula_in_double_precision(trainer, resumable, gamma):
    """timm: ema = lerp(ema, weights, 1 - decay), with decay constant or min(decay, 1 - (1 + step / gamma) ** -1)."""
    trail, module = Trail(), resumable()
    warmup = 0 if gamma is None else 1 + gamma
    trainer([WeightAveraging(EMA(0.8, warmup=warmup)), trail], max_epochs=3).fit(module)
    expected = {name: value.double() for name, value in trail.weights[0].items()}
    for step, weights in enumerate(trail.weights[1:], 2):
        decay = 0.8 if gamma is None else min(0.8, 1 - (1 + step / gamma) ** -1.0)
        expected = {name: torch.lerp(expected[name], weights[name].double(), 1 - decay) for name in expected}
    assert close(module.state_dict(), expected)


def test_swa_equals_torchs_averaged_model(trainer, resumable):
    theirs, module = TorchsAverage(), resumable()
    trainer([WeightAveraging(SWA(start=0), update_every=1), theirs], max_epochs=2).fit(module)
    assert close(module.layer.state_dict(), theirs.model.module.state_dict())


def test_swa_averages_the_epochs_ends_after_its_start(trainer, resumable):
    trail, module, averaging = Trail(), resumable(), WeightAveraging(SWA(start=0.5))
    trainer([averaging, trail], max_epochs=4).fit(module)
    ends = [trail.weights[11], trail.weights[15]]
    assert averaging.updates == 2
    assert close(module.state_dict(), {name: (ends[0][name] + ends[1][name]).double() / 2 for name in ends[0]})


def test_lawa_averages_the_latest(trainer, resumable):
    trail, module = Trail(), resumable()
    trainer([WeightAveraging(LAWA(k=3)), trail], max_epochs=5).fit(module)
    ends = [trail.weights[step] for step in (11, 15, 19)]
    assert close(module.state_dict(), {n: sum(end[n].double() for end in ends) / 3 for n in ends[0]})


@pytest.mark.parametrize(("every", "updates"), [(1, 12), (5, 2), ("epoch", 3)])
def test_updates_are_counted_in_optimizer_steps(trainer, resumable, every, updates):
    averaging, trail, module = WeightAveraging(EMA(0.5, warmup=0), update_every=every), Trail(), resumable()
    trainer([averaging, trail], max_epochs=3).fit(module)
    assert averaging.updates == updates
    size = 4 if every == "epoch" else every
    assert close(module.state_dict(), ema_of(trail.weights[size - 1 :: size], 0.5))


def test_d8_micro_batches_and_dropped_steps_are_no_updates(trainer, resumable):
    class Drop(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                engine_of(trainer).veto_step(optimizer)

    averaging = WeightAveraging(EMA(0.5))
    run = trainer([averaging, Drop()], max_epochs=2, accumulate_grad_batches=2)
    run.fit(resumable())
    assert (run.global_step, averaging.updates) == (4, 3)


# -- what sees the average -------------------------------------------------------------------------------------------


class Spy(Callback):
    """The weights that each hook of a validation finds, the module's own included."""

    def __init__(self):
        self.seen = []

    def see(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.seen.append(copied(pl_module))

    on_validation_start = on_validation_epoch_start = on_validation_epoch_end = on_validation_end = see


def test_d4_validation_sees_the_average_in_every_hook_and_training_the_raw_weights(trainer, resumable, same_weights):
    class Watching(resumable):
        def see(self):
            if not self.trainer.sanity_checking:
                spy.seen.append(copied(self))

        on_validation_start = on_validation_epoch_start = on_validation_epoch_end = on_validation_end = see
        on_validation_model_eval = see

        def on_validation_model_train(self):
            self.see()
            self.train()

        def on_train_epoch_end(self):
            after.append(copied(self))

    spy, trail, after = Spy(), Trail(), []
    trainer([spy, WeightAveraging(EMA(0.5, warmup=0)), trail], max_epochs=1).fit(Watching())
    assert len(spy.seen) == 10
    assert all(same_weights(spy.seen[0], weights) for weights in spy.seen)
    assert close(spy.seen[0], ema_of(trail.weights, 0.5))
    assert same_weights(after[0], trail.weights[-1])


def test_d10_before_the_first_update_nothing_is_swapped(trainer, resumable, same_weights):
    spy, trail, module = Spy(), Trail(), resumable()
    run = trainer([WeightAveraging(SWA(start=0.9)), spy, trail], max_epochs=2, max_steps=6)
    with pytest.warns(UserWarning, match="the fit ended before the first update of SWA"):
        run.fit(module)
    assert all(same_weights(weights, trail.weights[3]) for weights in spy.seen)
    assert same_weights(copied(module), trail.weights[-1])


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", ["validation_step", "on_validation_end"])
def test_d3_what_ends_a_validation_brings_the_raw_weights_back(trainer, resumable, same_weights, error, hook):
    class Breaking(resumable):
        def break_down(self, *_):
            if not self.trainer.sanity_checking:
                raise error

    setattr(Breaking, hook, Breaking.break_down)
    trail, module = Trail(), Breaking()
    averaging = WeightAveraging(EMA(0.5, warmup=0))
    with pytest.raises((KeyError, SystemExit)):
        trainer([averaging, trail]).fit(module)
    assert same_weights(copied(module), trail.weights[-1])
    with averaging.applied():  # and the average is not lost
        assert close(copied(module), ema_of(trail.weights, 0.5))
    assert same_weights(copied(module), trail.weights[-1])


def test_d5_stopping_early_delivers_the_average(trainer, resumable):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 5

    trail, module = Trail(), resumable()
    trainer([Stop(), WeightAveraging(EMA(0.5, warmup=0)), trail]).fit(module)
    assert 5 <= len(trail.weights) < 24
    assert close(module.state_dict(), ema_of(trail.weights, 0.5))


def test_d6_tied_weights_are_updated_once(trainer, resumable):
    class Tied(resumable):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 1)
            self.other.weight = self.layer.weight

    trail, module = Trail(), Tied()
    trainer([WeightAveraging(EMA(0.5, warmup=0)), trail], max_epochs=1).fit(module)
    assert close(module.state_dict(), ema_of(trail.weights, 0.5))
    assert module.other.weight is module.layer.weight


@pytest.mark.filterwarnings("ignore:Not as on one device")  # which says that bf16-true loses small updates
def test_d7_the_average_of_low_precision_weights_moves(trainer, resumable):
    class Low(resumable):
        def __init__(self):
            super().__init__(lr=1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.layer.weight.fill_(2.0)

        def training_step(self, batch, _):
            return self.layer(batch[0]).float().sum()

        def validation_step(self, batch, _):
            return None

    module = Low()
    module.layer.weight.data.fill_(1.0)
    averaging = WeightAveraging(EMA(0.999, warmup=0))
    trainer([averaging], max_steps=1000, max_epochs=-1, precision="bf16-true", limit_val_batches=0).fit(module)
    expected = 1 + (1 - 0.999**999)
    assert module.layer.weight.detach().float().mean() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("purpose", ["validation", "result"])
def test_what_the_average_is_used_for_can_be_chosen(trainer, resumable, same_weights, purpose):
    spy, trail, module = Spy(), Trail(), resumable()
    trainer([WeightAveraging(EMA(0.5, warmup=0), use_for=[purpose]), spy, trail], max_epochs=1).fit(module)
    average, raw = ema_of(trail.weights, 0.5), trail.weights[-1]
    if purpose == "validation":
        assert close(spy.seen[0], average)
        assert same_weights(copied(module), raw)
    else:
        assert same_weights(spy.seen[0], raw)
        assert close(copied(module), average)


# -- statistics of normalisations ------------------------------------------------------------------------------------


@pytest.fixture
def normalised(resumable):
    class Normalised(resumable):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.0), nn.Linear(3, 1))
            self.register_buffer("seen", torch.tensor(0))
            self.register_buffer("drift", torch.zeros(2))

        def training_step(self, batch, _):
            self.seen += 1
            self.drift += torch.randn(2)
            loss = self.loss(batch)
            self.log("train/loss", loss)
            return loss

    return Normalised


def test_d9_running_statistics_are_those_of_torchs_update_bn(trainer, normalised):
    spy, theirs, module = Spy(), TorchsAverage(), normalised()
    trainer([WeightAveraging(SWA(start=0), update_every=1), spy, theirs], max_epochs=1).fit(module)
    data = module.train_dataloader()
    update_bn(((x, y) for x, y in data), theirs.model)
    expected = theirs.model.module.state_dict()
    for found in (spy.seen[0], copied(module)):
        for name, value in expected.items():
            assert torch.allclose(found[f"layer.{name}"], value, rtol=1e-5, atol=1e-6), name
        assert found["layer.1.num_batches_tracked"].dtype == torch.int64
        assert found["seen"] == 4


def test_d9_estimating_leaves_training_as_it_is(trainer, normalised, same_weights):
    def fit(*callbacks):
        torch.manual_seed(5)
        trail, module = Trail(), normalised()
        trainer([*callbacks, trail], max_epochs=3, val_check_interval=2).fit(module)
        return trail.weights

    alone, averaged = fit(), fit(WeightAveraging(EMA(0.5), use_for=["validation"]))
    assert len(alone) == len(averaged) == 12
    assert all(same_weights(one, other) for one, other in zip(alone, averaged, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_d9_with_torchs_own_loader_too(trainer, normalised, same_weights, workers):
    class Plain(normalised):
        def train_dataloader(self):
            data = super().train_dataloader().dataset
            generator = torch.Generator().manual_seed(3)
            return DataLoader(
                data,
                batch_size=2,
                shuffle=True,
                generator=generator,
                num_workers=workers,
                persistent_workers=workers > 0,
            )

    def fit(*callbacks):
        torch.manual_seed(5)
        trail = Trail()
        trainer([*callbacks, trail], max_epochs=2, val_check_interval=2).fit(Plain())
        return trail.weights

    alone, averaged = fit(), fit(WeightAveraging(EMA(0.5), use_for=["validation"], statistics_batches=2))
    assert all(same_weights(one, other) for one, other in zip(alone, averaged, strict=True))


def test_statistics_of_the_raw_weights_when_asked(trainer, normalised):
    trail, module = Trail(), normalised()
    trainer([WeightAveraging(EMA(0.5), statistics_batches=0), trail], max_epochs=1).fit(module)
    assert torch.equal(module.layer[1].running_mean, trail.weights[-1]["layer.1.running_mean"])


# -- files -----------------------------------------------------------------------------------------------------------


def test_d1_weights_only_holds_the_average_and_says_so(trainer, normalised, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_weights_only=True, save_top_k=-1, filename="{epoch}")
    spy, module = Spy(), normalised()
    trainer([WeightAveraging(EMA(0.5)), spy, saver], enable_checkpointing=True, max_epochs=2).fit(module)
    for epoch in range(2):
        file = torch.load(tmp_path / "saved" / f"epoch={epoch}.ckpt", weights_only=True)
        assert close(file["state_dict"], spy.seen[4 * epoch])
        assert file["lightning_tricks"]["averaged"]["updates"] == str(4 * (epoch + 1))
        assert "EMA(decay=0.5" in file["lightning_tricks"]["averaged"]["average"]
        assert "optimizer_states" not in file
    loaded = normalised.load_from_checkpoint(tmp_path / "saved" / "epoch=1.ckpt", strict=True)
    assert close(loaded.state_dict(), module.state_dict())


@pytest.mark.parametrize("when", ["training", "validation"])
def test_full_checkpoints_hold_the_raw_weights_and_the_average(trainer, resumable, same_weights, tmp_path, when):
    class Save(Callback):
        """Comes before the averaging, and saves before that has updated."""

        def save(self, trainer, *_):
            if trainer.global_step == 4 and not (tmp_path / "full.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "full.ckpt")

    setattr(Save, "on_train_batch_end" if when == "training" else "on_validation_end", Save.save)
    trail = Trail()
    trainer([Save(), WeightAveraging(EMA(0.5, warmup=0)), trail], max_epochs=2).fit(resumable())
    file = torch.load(tmp_path / "full.ckpt", weights_only=True)
    assert same_weights(file["state_dict"], trail.weights[3])
    (values,) = file["lightning_tricks"]["values"].values()
    assert close(values, ema_of(trail.weights[:4], 0.5))
    assert "averaged" not in file["lightning_tricks"]


def test_d2_fit_then_test_on_one_trainer_tests_the_average(trainer, normalised, tmp_path):
    class Tested(Callback):
        def on_test_start(self, trainer, pl_module):
            self.weights = copied(pl_module)

    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    spy, tested, module, averaging = Spy(), Tested(), normalised(), WeightAveraging(EMA(0.5))
    run = trainer([averaging, spy, saver, tested], enable_checkpointing=True, max_epochs=2)
    run.fit(module)
    after = copied(module)
    [found] = run.test(ckpt_path=tmp_path / "saved" / "epoch=0.ckpt", verbose=False)
    assert close(tested.weights, spy.seen[0])
    run.test(module, ckpt_path=tmp_path / "saved" / "epoch=1.ckpt", verbose=False)
    assert close(tested.weights, after)
    assert averaging.updates == 8
    other = trainer([WeightAveraging(EMA(0.5)), tested], max_epochs=2)
    [again] = other.test(normalised(), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt", verbose=False)
    assert again == found
    trainer([WeightAveraging(EMA(0.5), use_for=[]), tested]).test(
        normalised(), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt", verbose=False
    )
    assert not close(tested.weights, spy.seen[0])


@pytest.fixture
def compiled(resumable):
    """A module class that compiles a submodule of its own as it is built."""

    class Compiled(resumable):
        def __init__(self):
            super().__init__()
            self.layer = torch.compile(self.layer, backend="eager")

    return Compiled


def plain(state):
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


@pytest.mark.parametrize("how", ["the whole module", "in place", "afterwards", "as it is built"])
def test_d13_files_are_the_same_compiled_or_not(trainer, resumable, compiled, same_weights, tmp_path, how):
    """The files of a module that is given compiled are the same bytes. One that wraps a part of its own names it so."""

    def fit(name, module, given=None):
        class Save(Callback):
            def on_validation_end(self, trainer, pl_module):
                trainer.save_checkpoint(tmp_path / f"{name} full.ckpt")
                trainer.save_checkpoint(tmp_path / f"{name} weights.ckpt", weights_only=True)
                averaging.save_average(tmp_path / f"{name}.safetensors")

        averaging = WeightAveraging(EMA(0.5))
        trainer([Save(), averaging], max_epochs=1, num_sanity_val_steps=0).fit(module if given is None else given)
        paths = [tmp_path / f"{name} {kind}.ckpt" for kind in ("full", "weights")]
        return [torch.load(path, weights_only=True) for path in paths], (tmp_path / f"{name}.safetensors").read_bytes()

    module = compiled() if how == "as it is built" else resumable()
    given = torch.compile(module, backend="eager") if how == "the whole module" else None
    if how == "in place":
        module.layer.compile(backend="eager")
    elif how == "afterwards":
        module.layer = torch.compile(module.layer, backend="eager")
    found, expected = fit("found", module, given), fit("expected", resumable())
    assert found[1] == expected[1]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert same_weights(plain(ours["state_dict"]), theirs["state_dict"])
        assert ours["lightning_tricks"].keys() == theirs["lightning_tricks"].keys()
    (values,), (others,) = (each[0][0]["lightning_tricks"]["values"].values() for each in (found, expected))
    assert same_weights(values, others)
    paths = [tmp_path / f"{name} weights.ckpt" for name in ("found", "expected")]
    average_checkpoints(paths, tmp_path / "mean.ckpt")
    assert same_weights(
        torch.load(tmp_path / "mean.ckpt", weights_only=True)["state_dict"], expected[0][1]["state_dict"]
    )
    if how in ("the whole module", "in place"):
        assert paths[0].read_bytes() == paths[1].read_bytes()
    else:  # its own names, by which it loads strictly
        assert found[0][1]["state_dict"].keys() == module.state_dict().keys() != expected[0][1]["state_dict"].keys()
    if how == "as it is built":
        loaded = compiled.load_from_checkpoint(paths[0], strict=True)
        assert same_weights(plain(loaded.state_dict()), expected[0][1]["state_dict"])


def test_d14_files_of_an_average_are_combined_with_their_like_or_refused(trainer, resumable, tmp_path):
    class Save(Callback):
        def on_validation_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "full.ckpt")
                trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
                averaging.save_average(tmp_path / "average.safetensors")

    averaging = WeightAveraging(EMA(0.5))
    trainer([Save(), averaging], max_epochs=1, num_sanity_val_steps=0).fit(resumable())
    consolidate(tmp_path / "full.ckpt", tmp_path / "raw.safetensors")
    raw, average = tmp_path / "raw.safetensors", tmp_path / "average.safetensors"
    for suffix in ("ckpt", "safetensors"):
        mean = tmp_path / f"mean.{suffix}"
        average_checkpoints([average, tmp_path / "weights.ckpt"], mean)
        for one, other in [(average, raw), (raw, average), (mean, raw), (raw, mean)]:
            with pytest.raises(CheckpointError, match="holds a running average of the weights"):
                average_checkpoints([one, other], tmp_path / "never.ckpt")
    with pytest.raises(CheckpointError, match=r"full\.ckpt is a full checkpoint of a run with WeightAveraging"):
        average_checkpoints([tmp_path / "full.ckpt"], tmp_path / "never.ckpt")
    assert len(average_checkpoints([raw, raw], tmp_path / "raw mean.ckpt").members) == 2
    assert not (tmp_path / "never.ckpt").exists()


def test_saving_after_the_fit_saves_what_the_module_holds(trainer, resumable, tmp_path, same_weights):
    module, averaging = resumable(), WeightAveraging(EMA(0.5))
    run = trainer([averaging], max_epochs=1)
    run.fit(module)
    for weights_only in (True, False):
        run.save_checkpoint(tmp_path / "after.ckpt", weights_only=weights_only)
        file = torch.load(tmp_path / "after.ckpt", weights_only=True)
        assert same_weights(file["state_dict"], module.state_dict())
        assert file["lightning_tricks"]["averaged"]["updates"] == "4"
    for policy in (EMA(0.5), EMA(0.6)):
        with pytest.warns(UserWarning, match="saved when its fit had ended"):
            trainer([WeightAveraging(policy)], max_epochs=2).fit(resumable(), ckpt_path=tmp_path / "after.ckpt")
    again = resumable()
    trainer([WeightAveraging(EMA(0.6))]).test(again, ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert same_weights(again.state_dict(), module.state_dict())


# -- resuming --------------------------------------------------------------------------------------------------------


POLICIES = [EMA(0.8), SWA(start=0.4), LAWA(k=2)]


@pytest.mark.parametrize("when", ["training", "validation", "epoch end"])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_d11_resumed_at_any_point_equals_uninterrupted(trainer, normalised, same_weights, tmp_path, policy, when):
    class Crash(Callback):
        def crash(self, trainer, *_):
            if trainer.global_step >= 6 and not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "crash.ckpt")
                raise KeyError("crash")

    hooks = {"training": "on_train_batch_end", "validation": "on_validation_end", "epoch end": "on_train_epoch_end"}
    setattr(Crash, hooks[when], Crash.crash)
    options = {"max_epochs": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}

    def fit(*extra, **resume):
        torch.manual_seed(7)
        spy, trail, averaging = Spy(), Trail(), WeightAveraging(policy, use_for=["validation"])
        trail.weights = [None] * 6 if resume else []
        module = normalised()
        module.training_step = lambda batch, batch_idx: module.loss(batch)
        trainer([averaging, spy, trail, *extra], **options).fit(module, **resume)
        return averaging, spy.seen[-1], trail.weights[-1]

    whole = fit()
    with pytest.raises(KeyError, match="crash"):
        fit(Crash())
    resumed = fit(ckpt_path=tmp_path / "crash.ckpt")
    assert resumed[0].updates == whole[0].updates > 1
    assert same_weights(resumed[1], whole[1])
    assert same_weights(resumed[2], whole[2])


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_offloaded_is_the_same_in_every_bit(trainer, normalised, same_weights, tmp_path, policy):
    class Save(Callback):
        def __init__(self, name, averaging):
            self.name, self.averaging = name, averaging

        def on_validation_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / self.name)
                self.averaging.save_average(tmp_path / f"{self.name}.safetensors")
                kept, own = self.averaging._average._copies, self.averaging._lender._own[0].values()
                assert {each.device.type for copy in [*kept, own] for each in copy} == {"cpu"}

    def fit(offload, **resume):
        torch.manual_seed(7)
        averaging, module = WeightAveraging(policy, update_every=1, offload=offload), normalised()
        module.training_step = lambda batch, batch_idx: module.loss(batch)  # draws no random numbers
        spy, trail, save = Spy(), Trail(), Save(f"{offload}.ckpt", averaging)
        trail.weights = [None] * 4 if resume else []
        options = {"max_epochs": 2, "num_sanity_val_steps": 0, "val_check_interval": 2}
        trainer([averaging, spy, trail, *([] if resume else [save])], **options).fit(module, **resume)
        return [*spy.seen, trail.weights[-1], copied(module)], averaging.updates

    (there, updates), (here, expected) = fit(True), fit(False)
    assert updates == expected > 2
    assert all(map(same_weights, there, here))
    files = [(tmp_path / f"{offload}.ckpt.safetensors").read_bytes() for offload in (True, False)]
    assert files[0] == files[1]
    for offload in (True, False):
        again, updates = fit(offload, ckpt_path=tmp_path / f"{not offload}.ckpt")
        assert updates == expected
        assert all(map(same_weights, again[-3:], here[-3:]))


def test_resuming_a_finished_run_delivers_its_average(trainer, resumable, same_weights, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True)
    module = resumable()
    trainer([WeightAveraging(EMA(0.5)), saver], enable_checkpointing=True, max_epochs=2).fit(module)
    again = resumable()
    trainer([WeightAveraging(EMA(0.5))], max_epochs=2).fit(again, ckpt_path=saver.last_model_path)
    assert same_weights(again.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    "other", [{"policy": EMA(0.6)}, {"policy": EMA(0.5), "update_every": 2}, {"policy": LAWA(k=2)}]
)
def test_an_average_of_other_options_is_not_passed_over_in_silence(trainer, resumable, same_weights, tmp_path, other):
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    trainer([WeightAveraging(EMA(0.5)), saver], enable_checkpointing=True, max_epochs=1).fit(resumable())
    path = tmp_path / "saved" / "epoch=0.ckpt"
    for act in ("test", "validate"):
        with pytest.raises(MisconfigurationError, match=r"holds the average of .*decay=0\.5.*raw weights.*use_for"):
            getattr(trainer([WeightAveraging(**other)]), act)(resumable(), ckpt_path=path, verbose=False)
    module = resumable()
    trainer([WeightAveraging(**other, use_for=["validation"])]).test(module, ckpt_path=path, verbose=False)
    assert same_weights(module.state_dict(), torch.load(path, weights_only=True)["state_dict"])
    averaging = WeightAveraging(**other, use_for=["validation"])
    with pytest.warns(UserWarning, match=r"decay=0\.5.*that average is left, and a new one begins"):
        trainer([averaging], max_epochs=2).fit(resumable(), ckpt_path=path)
    assert averaging.updates == {1: 4, 2: 2, "epoch": 1}[averaging.update_every]


def test_an_instance_that_is_new_beside_one_that_goes_on_says_nothing(trainer, resumable, tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", filename="{epoch}")
    trainer([WeightAveraging(EMA(0.5)), saver], enable_checkpointing=True, max_epochs=1).fit(resumable())
    both = [WeightAveraging(EMA(0.5)), WeightAveraging(EMA(0.9), use_for=[])]
    trainer(both, max_epochs=2).fit(resumable(), ckpt_path=saver.best_model_path)
    assert [averaging.updates for averaging in both] == [8, 4]


# -- with others -----------------------------------------------------------------------------------------------------


def test_e6_the_best_weights_are_the_averaged_ones_that_were_scored(trainer, resumable, diary, same_weights):
    class Scored(resumable):
        scores = (3.0, 1.0, 2.0)

    module = Scored([3.0, 1.0, 2.0])
    early = EarlyStopping("val/score", mode="min", patience=5)
    ensemble = CheckpointEnsemble(TopK(2, monitor="val/score", mode="min"))
    saver = WeightAveraging(EMA(0.5))
    trainer([early, ensemble, saver, diary], max_epochs=3).fit(module)
    assert same_weights(module.state_dict(), diary.weights[1])
    best = WeightsFile(early.best_path)
    assert all(torch.equal(best.tensor(name), diary.weights[1][name]) for name in best.names)
    mean = torch.load(ensemble.path, weights_only=True)["state_dict"]
    assert close(mean, {name: (diary.weights[1][name] + diary.weights[2][name]).double() / 2 for name in mean})
    assert ensemble.results["ensemble"]["val/loss"] != ensemble.results["best"]["val/loss"]


@pytest.mark.parametrize("policy", [LastK(2), Every(epochs=1), Cyclic(cycles=2)], ids=repr)
def test_members_that_are_not_taken_in_a_validation_are_raw_weights(trainer, resumable, policy, same_weights):
    trail, ensemble = Trail(), CheckpointEnsemble(policy, Predictions())
    trainer([ensemble, WeightAveraging(EMA(0.5)), trail], max_epochs=2).fit(resumable())
    members = [torch.load(path, weights_only=True)["state_dict"] for path in ensemble.paths]
    assert len(members) == 2
    assert same_weights(members[0], trail.weights[7])
    assert same_weights(members[1], trail.weights[3])


def test_several_instances_work_side_by_side(trainer, resumable, tmp_path):
    fast, slow = WeightAveraging(EMA(0.2, warmup=0)), WeightAveraging(EMA(0.9, warmup=0), use_for=[])

    class Save(Callback):
        def on_validation_end(self, trainer, *_):
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "full.ckpt")
                slow.save_average(tmp_path / "slow")

    trail, spy, module = Trail(), Spy(), resumable()
    trainer([slow, fast, trail, Save(), spy], max_epochs=2).fit(module)
    assert close(spy.seen[-1], ema_of(trail.weights, 0.2))
    assert close(module.state_dict(), ema_of(trail.weights, 0.2))
    file = WeightsFile(tmp_path / "slow")
    assert close({name: file.tensor(name) for name in file.names}, ema_of(trail.weights, 0.9))
    assert len(torch.load(tmp_path / "full.ckpt", weights_only=True)["lightning_tricks"]["values"]) == 2
    with pytest.raises(MisconfigurationError, match="two instances of WeightAveraging both have `checkpoints`"):
        trainer([WeightAveraging(EMA(0.1)), WeightAveraging(EMA(0.2))]).fit(resumable())


def test_lightnings_own_beside_it_is_refused(trainer, resumable):
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    with pytest.raises(MisconfigurationError, match="Lightning's StochasticWeightAveraging both put averages"):
        trainer([WeightAveraging(), StochasticWeightAveraging(0.1)]).fit(resumable())


def test_manual_optimisation_with_statistics_is_refused(trainer, normalised):
    module = normalised()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationError, match=r"running statistics of BatchNorm1d.*`statistics_batches=0`"):
        trainer([WeightAveraging()]).fit(module)


def test_swa_of_a_fit_without_an_end_needs_a_number_of_steps(trainer, resumable):
    with pytest.raises(MisconfigurationError, match="needs to know how many optimizer steps"):
        trainer([WeightAveraging(SWA())], max_epochs=-1).fit(resumable())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), "`decay` must be at least 0 and below 1, got 1.0"),
        (lambda: EMA(-0.1), "got -0.1"),
        (lambda: EMA(math.nan), "got nan"),
        (lambda: EMA(0.9, warmup=0.5), "`warmup` must be 0 or above 1, got 0.5"),
        (lambda: SWA(start=1.0), "`start` must be a fraction"),
        (lambda: SWA(start=-1), "got -1"),
        (lambda: SWA(start=True), "got True"),
        (lambda: LAWA(k=1), "2 or more, got 1"),
        (lambda: WeightAveraging(0.9), "must be an EMA, an SWA or a LAWA, got 0.9"),
        (lambda: WeightAveraging(update_every=0), "`update_every` must be"),
        (lambda: WeightAveraging(update_every="batch"), "got 'batch'"),
        (lambda: WeightAveraging(use_for=["training"]), "`use_for` must be a list out of checkpoints, result"),
        (lambda: WeightAveraging(use_for="test"), "got 'test'"),
        (lambda: WeightAveraging(statistics_batches=-1), "`statistics_batches`.*got -1"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(MisconfigurationError, match=message):
        make()


def test_the_average_takes_one_fp32_copy(trainer, resumable):
    averaging, module = WeightAveraging(EMA(0.9)), resumable()
    size = sum(parameter.numel() for parameter in module.parameters())

    class Measure(Callback):
        def on_train_batch_end(self, *_):
            assert averaging._average.nbytes() == 4 * size

    trainer([averaging, Measure()], max_epochs=1).fit(module)
    assert averaging._average.nbytes() == 0


def test_what_a_loader_of_arrays_gives_is_estimated_from(trainer, normalised):
    """A list of batches is a loader too."""

    class Listed(normalised):
        def train_dataloader(self):
            data = TensorDataset(*normalised.train_dataloader(self).dataset.tensors)
            return {"a": DataLoader(data, batch_size=4)}

        def training_step(self, batch, _):
            return self.loss(batch["a"])

    module = Listed()
    trainer([WeightAveraging(EMA(0.5))], max_epochs=1).fit(module)
    assert module.layer[1].num_batches_tracked == 2
