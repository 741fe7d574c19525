"""What every engine must do, as functions that a worker runs: `one_device` writes references, the others compare."""

import gc
import weakref
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightning_tricks  # noqa: F401  (registers the flags)
from lightning_tricks.data import TricksDataLoader
from lightning_tricks.engines import engine_of, ranks, read_checkpoint, whole
from lightning_tricks.errors import CheckpointError, MisconfigurationError, UnsupportedError
from lightning_tricks.storage import WeightsFile
from tests.orders import kept_shuffle

BATCH = 8  # samples of a global batch
ONLY = {
    "lightnings_own_strategy": ("ddp", "fsdp2"),  # one device has a single one; DeepSpeedStrategy refuses CPUs
    "shards_cut_otherwise": ("fsdp2",),
    "single_file_fit": ("zero_1", "zero_2", "zero_3"),
    "offloaded": ("zero_1", "zero_2", "zero_3"),
    "vetoed_unchecked": ("zero_1", "zero_2", "zero_3"),
    "engines_keep_no_model_alive": ("one_device", "ddp", "fsdp2"),  # DeepSpeed's gradient hooks keep its engines
}


class Run:
    """The engine under test and its folder."""

    def __init__(self, engine: str, folder: Path) -> None:
        import os

        self.engine = engine
        self.folder = folder
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))

    @property
    def is_reference(self) -> bool:
        return self.engine == "one_device"

    def trainer(self, *callbacks: L.Callback, **options) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": self.world,
            "strategy": "auto" if self.is_reference else self.engine,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": self.folder,
            "callbacks": list(callbacks),
        }
        return L.Trainer(**{**defaults, **options})

    def path(self, name: str) -> Path:
        return self.folder / f"{self.engine}-{name}"

    def compare(self, name: str, values: dict[str, torch.Tensor], tolerance: float) -> None:
        """Hold values against those of one device, relative to each tensor's largest value."""
        reference = self.folder / f"reference-{name}.pt"
        if self.is_reference:
            torch.save(values, reference)
            return
        expected = torch.load(reference)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            distance = (values[key].double() - value.double()).abs().max() / value.double().abs().max()
            assert distance <= tolerance, f"{name}: {key} is {distance:.2e} off, more than {tolerance:.0e}"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 3 * width)
        self.back = nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.back(torch.nn.functional.gelu(self.wide(self.norm(x))))


class Net(L.LightningModule):
    """Odd widths, so that nothing divides evenly; a float and an integer buffer."""

    def __init__(self, batches: int = 20, optimizer: str = "adamw", poison: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.batches, self.optimizer, self.poison = batches, optimizer, poison
        self.enter = nn.Linear(6, 11)
        self.blocks = nn.ModuleList([Block(11), Block(11)])
        self.head = nn.Linear(11, 3)
        self.register_buffer("offset", torch.full((3,), 0.25))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden) + self.offset

    def training_step(self, batch, index):
        self.seen += 1
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self(inputs).float(), targets)
        return loss * float("nan") if self.poison is not None and self.global_step == self.poison else loss

    def test_step(self, batch, index):
        self.log("test/loss", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=0.1)
        return torch.optim.AdamW(trained, lr=1e-2)

    def train_dataloader(self):
        return loader(self.batches)

    def test_dataloader(self):
        return loader(2)


class Adapted(Net):
    """A frozen body that its checkpoints leave out, as an adapter's do."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        for module in (self.enter, self.blocks[0]):
            module.requires_grad_(False)
        self.register_state_dict_post_hook(self._drop_frozen)
        self.register_load_state_dict_post_hook(self._tolerate_frozen)

    def _frozen(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    @staticmethod
    def _drop_frozen(module, state, prefix, metadata):
        for name in module._frozen():
            state.pop(prefix + name, None)

    @staticmethod
    def _tolerate_frozen(module, keys):
        frozen = module._frozen()
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


def loader(batches: int) -> TricksDataLoader:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(batches * BATCH, 6, generator=generator)
    targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(-1)
    return kept_shuffle(TensorDataset(inputs, targets), batch_size=BATCH // ranks()[1], seed=5)


class Probe(L.Callback):
    """Records norms, clips, saves at a step, stops at one."""

    def __init__(self, *, limit: float | None = None, save: tuple[int, Path] | None = None) -> None:
        self.limit, self.save = limit, save
        self.norms: list[float] = []

    def setup(self, trainer, pl_module, stage):
        if self.limit is not None and stage == "fit":
            engine_of(trainer).claim_gradient_clipping("Probe")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine = engine_of(trainer)
        if not engine.is_optimizer_step():
            return
        norm = engine.gradient_norm(optimizer)
        assert norm.dtype == torch.float32
        assert norm.shape == ()
        assert engine.gradient_norm(optimizer) is norm
        self.norms.append(float(norm))
        if self.limit is not None:
            engine.clip_gradient_norm(optimizer, self.limit)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if self.save is not None and trainer.global_step == self.save[0]:
            trainer.save_checkpoint(self.save[1])


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return dict(engine_of(trainer).named_full_weights())


def fit(run: Run, module: L.LightningModule, probe: Probe, ckpt_path: Path | None = None, **options) -> L.Trainer:
    trainer = run.trainer(probe, **options)
    trainer.fit(module, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return trainer


def float_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights_of(trainer).items() if tensor.is_floating_point()}


# -- the checks ----------------------------------------------------------------------------------------------------


def fitted_again(run):
    """One module, fitted, tested, and fitted again by other Trainers: nothing of the first fits is in the way."""
    module = Net(batches=3)
    first = fit(run, module, Probe(limit=0.5), max_epochs=1)
    first.fit_loop.max_epochs = 2
    first.fit(module)
    first.test(module, verbose=False)
    last = fit(run, module, Probe(limit=0.5), max_epochs=1)
    del first
    gc.collect()  # what is left of the first fits ends here, and takes nothing along
    run.compare("fitted-again", float_weights(last), 2e-5)


def names_and_ranks(run):
    trainer = fit(run, Net(batches=1), Probe(), max_epochs=1)
    engine = engine_of(trainer)
    assert engine.name == run.engine
    assert (engine.rank, engine.world_size) == (run.rank, run.world) == ranks()
    assert engine_of(trainer) is engine
    value = torch.tensor([1.0, run.rank])
    assert engine.sum_over_ranks(value).tolist() == [run.world, sum(range(run.world))]
    assert value.tolist() == [1.0, run.rank]
    assert engine.broadcast({"rank": run.rank}, run.world - 1) == {"rank": run.world - 1}
    engine.barrier()


def twenty_steps(run):
    """The weights and the norms of one device after 20 AdamW steps in fp32."""
    probe = Probe()
    trainer = fit(run, Net(), probe, max_epochs=1)
    assert trainer.global_step == len(probe.norms) == 20
    run.compare("twenty-weights", float_weights(trainer), 2e-5)
    run.compare("twenty-norms", {"norms": torch.tensor(probe.norms)}, 1e-5)


def accumulation(run):
    """Windows of four batches, the last of an epoch holding two: as on one device."""
    probe = Probe()
    trainer = fit(run, Net(batches=10, optimizer="sgd"), probe, max_epochs=2, accumulate_grad_batches=4)
    assert trainer.global_step == len(probe.norms) == 6
    run.compare("accumulation-weights", float_weights(trainer), 2e-5)
    run.compare("accumulation-norms", {"norms": torch.tensor(probe.norms)}, 1e-5)


def clipping(run):
    """A limit that takes effect in the very step, at every step."""
    probe = Probe(limit=0.05)
    trainer = fit(run, Net(batches=6, optimizer="sgd"), probe, max_epochs=1, accumulate_grad_batches=2)
    assert min(probe.norms) > 0.05
    run.compare("clipped-weights", float_weights(trainer), 2e-5)
    moved = {
        name: value - dict(Net().named_parameters())[name]
        for name, value in float_weights(trainer).items()
        if name != "offset"
    }
    length = torch.stack([value.norm() for value in moved.values()]).norm()
    assert length <= 3 * 0.1 * 0.05 * 1.0001


def scaled_gradients(run):
    """Under fp16 with a loss scale of 65536, the norm is of the unscaled gradients and the limit means the same."""
    probe = Probe(limit=0.05)
    module = Net(batches=4, optimizer="sgd")
    trainer = fit(run, module, probe, max_epochs=1, **fp16_options(run))
    run.compare("fp16-norms", {"norms": torch.tensor(probe.norms)}, 2e-2)
    start = dict(Net().named_parameters())
    moved = [value - start[name] for name, value in float_weights(trainer).items() if name in start]
    length = float(torch.stack([value.norm() for value in moved]).norm())
    assert 0.5 * 4 * 0.1 * 0.05 < length <= 4 * 0.1 * 0.05 * 1.01, length


class Scales(Probe):
    """Multiplies gradients by 0.75 in all, before and after their norm is asked for the first time; perhaps clips."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine = engine_of(trainer)
        engine.scale_gradients(optimizer, 0.5)
        before = engine.gradient_norm(optimizer)
        engine.scale_gradients(optimizer, 1.5)
        assert torch.allclose(engine.gradient_norm(optimizer), 1.5 * before)
        whole = engine.gradient_norms(optimizer, {"all": [name for name, _ in pl_module.named_parameters()]})["all"]
        assert torch.allclose(whole, 1.5 * before, rtol=1e-3)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


class Smaller(Net):
    """The same, by its loss."""

    def training_step(self, batch, index):
        return 0.75 * super().training_step(batch, index)


def scaled_by_a_factor(run):
    """Gradients times 0.75 are those of a loss times 0.75: norms, clipping at some steps, weights; in fp16 too."""
    for options, tolerance in (({}, 1e-5), (fp16_options(run), 2e-2)):
        ways = ((Net, Scales), (Smaller, Probe))
        probes = [probe(limit=0.88) for _, probe in ways]
        trainers = [
            fit(run, module(batches=6, optimizer="sgd"), probe, max_epochs=1, **options)
            for (module, _), probe in zip(ways, probes, strict=True)
        ]
        ours, wanted = (probe.norms for probe in probes)
        assert ours == pytest.approx(wanted, rel=tolerance)
        assert min(ours) < 0.88 < max(ours), f"clips every step, or none: {ours}"
        expected = float_weights(trainers[1])
        for name, value in float_weights(trainers[0]).items():
            assert (value - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name
    with pytest.raises(MisconfigurationError, match=r"`factor` must be a finite number above 0, got 0\.0"):
        engine_of(trainers[0]).scale_gradients(trainers[0].optimizers[0], 0.0)


def fp16_options(run) -> dict:
    if not run.engine.startswith("zero"):
        from lightning.pytorch.plugins import MixedPrecision

        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it says no on CPU, where it works
    return {"precision": "16-true"}


def lightnings_own_strategy(run):
    """Chosen without our flags, Lightning's own strategies have an engine too."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if run.engine == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    else:
        strategy = ModelParallelStrategy(data_parallel_size=run.world, tensor_parallel_size=1)
    probe = Probe(limit=0.2)
    trainer = fit(run, OwnSharding(batches=4), probe, max_epochs=1, strategy=strategy)
    path = run.path("own.safetensors")
    engine_of(trainer).save_weights(path)
    engine_of(trainer).load_weights(path)
    assert engine_of(trainer).name == run.engine
    ours = Probe(limit=0.2)
    fit(run, Net(batches=4), ours, max_epochs=1)
    assert probe.norms == pytest.approx(ours.norms, rel=1e-5)


class OwnSharding(Net):
    """Shards itself under FSDP2, as Lightning's strategy wants it."""

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = getattr(self, "device_mesh", None)
        if mesh is not None and not isinstance(self.enter, FSDPModule):
            for module in (self.enter, *self.blocks, self.head):
                fully_shard(module, mesh=mesh["data_parallel"])


def weights_file(run):
    """Saved, trained on, loaded back: bit for bit, and what the model computes with."""
    path = run.path("weights.safetensors")
    taken = {}

    class Turn(Probe):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            engine = engine_of(trainer)
            if trainer.global_step == 3:
                engine.save_weights(path, {"step": "3"})
                taken.update(engine.named_full_weights())
            if trainer.global_step == 5:
                now = dict(engine.named_full_weights())
                assert not torch.equal(now["head.weight"], taken["head.weight"])
                engine.load_weights(path)
                for name, value in engine.named_full_weights():
                    assert torch.equal(value, taken[name]), name

    module = Net(batches=5)
    trainer = fit(run, module, Turn(), max_epochs=1)
    file = WeightsFile(path)
    assert file.metadata == {"step": "3"}
    assert list(file.names) == list(Net().state_dict())
    assert {name: file.layout[name][0] for name in ("seen", "offset")} == {"seen": torch.int64, "offset": torch.float32}
    plain = Net()
    plain.load_state_dict({name: file.tensor(name) for name in file.names}, strict=True)
    run.compare("three-weights", {"head": plain.head.weight.detach()}, 2e-5)
    loss = trainer.test(module, verbose=False)[0]["test/loss"]
    inputs, targets = loader(2).dataset.tensors
    whole_loss = float(nn.functional.cross_entropy(plain(inputs), targets))
    assert abs(loss - whole_loss) < 1e-5, (loss, whole_loss)


def weights_file_bf16(run):
    """As above under bf16-mixed: fp32 masters in the file, bit-exact back."""
    path = run.path("weights-bf16.safetensors")
    taken = {}

    class Turn(Probe):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            engine = engine_of(trainer)
            if trainer.global_step == 2:
                engine.save_weights(path)
                taken.update(engine.named_full_weights())
            if trainer.global_step == 4:
                engine.load_weights(path)
                for name, value in engine.named_full_weights():
                    assert torch.equal(value, taken[name]), name
                    own = dict(pl_module.named_parameters()).get(name)
                    if own is not None and own.shape == value.shape and not hasattr(own, "placements"):
                        assert torch.equal(own.detach().float(), value.to(own.dtype).float()), name

    probe = Turn()
    trainer = fit(run, Net(batches=6), probe, max_epochs=1, precision="bf16-mixed")
    dtypes = {name: WeightsFile(path).layout[name][0] for name in ("head.weight", "enter.bias", "seen")}
    assert dtypes == {"head.weight": torch.float32, "enter.bias": torch.float32, "seen": torch.int64}
    assert any((value != value.bfloat16().float()).any() for value in taken.values() if value.is_floating_point())
    run.compare("bf16-norms", {"norms": torch.tensor(probe.norms[:2])}, 5e-2)
    assert trainer.global_step == 6


def mismatches(run):
    """A file that does not fit is refused, and its first offending name is told."""
    path = run.path("mismatch.safetensors")
    trainer = fit(run, Net(batches=1), Probe(), max_epochs=1)
    engine_of(trainer).save_weights(path)
    other = Net(batches=1)
    other.enter = nn.Linear(6, 11, bias=False)
    trainer = fit(run, other, Probe(), max_epochs=1)
    with pytest.raises(CheckpointError, match=r"`enter.bias` is of shape \[11\] in the file and absent in the module"):
        engine_of(trainer).load_weights(path)


def unwritable(run):
    """Rank 0 cannot write: an error on every rank, no rank left waiting."""
    trainer = fit(run, Net(batches=1), Probe(), max_epochs=1)
    blocked = run.path("blocked")
    blocked.write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="blocked"):
        engine_of(trainer).save_weights(blocked / "weights.safetensors")


def resume(run):
    """Interrupted in mid-epoch and resumed equals uninterrupted, bit for bit, clipping included."""
    path = run.path("step5.ckpt")
    whole_run = fit(run, Net(batches=8), Probe(limit=0.3, save=(5, path)), max_epochs=2)
    assert not list(run.folder.glob(f".{path.name}*"))
    resumed = fit(run, Net(batches=8), Probe(limit=0.3), ckpt_path=path, max_epochs=2)
    assert resumed.global_step == whole_run.global_step == 16
    expected = weights_of(whole_run)
    for name, value in weights_of(resumed).items():
        assert torch.equal(value, expected[name]), name


def threshold_stays_behind(run):
    """A checkpoint written while a callback clipped does not make a later run clip."""
    path = run.path("clipped.ckpt")
    fit(run, Net(batches=8, optimizer="sgd"), Probe(limit=0.01, save=(4, path)), max_epochs=1)
    trainer = fit(run, Net(batches=8, optimizer="sgd"), Probe(), ckpt_path=path, max_epochs=1)
    run.compare("unclipped-after-resume", float_weights(trainer), 2e-5)


def overwritten(run):
    """A second save under one name replaces the first, completely."""
    path = run.path("twice.ckpt")
    probe = Probe(save=(1, path))
    trainer = fit(run, Net(batches=2), probe, max_epochs=1)
    trainer.save_checkpoint(path)
    assert read_checkpoint(path)["global_step"] == 2
    assert sorted(file.name for file in run.folder.glob(f"*{path.name}*")) == [path.name]


def read(run):
    """Any engine's checkpoint as whole fp32 tensors that load strictly into the plain module."""
    path = run.path("read.ckpt")
    trainer = fit(run, Net(batches=4), Probe(save=(4, path)), max_epochs=1)
    checkpoint = read_checkpoint(path)
    expected = weights_of(trainer)
    assert checkpoint["state_dict"].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(checkpoint["state_dict"][name], value), name
    Net().load_state_dict(checkpoint["state_dict"], strict=True)
    assert checkpoint["global_step"] == 4
    assert checkpoint["hyper_parameters"] == {}


def frozen(run):
    """Frozen weights left out of checkpoints: small files, exact resume, the hook still there after a test."""
    path = run.path("frozen.ckpt")
    module = Adapted(batches=6)
    trained = set(module.state_dict())
    first = fit(run, module, Probe(save=(3, path)), max_epochs=1)
    assert set(weights_of(first)) == trained
    assert set(read_checkpoint(path)["state_dict"]) == trained
    resumed = fit(run, Adapted(batches=6), Probe(), ckpt_path=path, max_epochs=1)
    expected = weights_of(first)
    for name, value in weights_of(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(whole(module.enter.weight), Net().enter.weight)
    run.compare("frozen-weights", float_weights(first), 2e-5)
    first.test(module, verbose=False)
    assert set(module.state_dict()) == trained


def frozen_kept(run):
    """Frozen weights that the module does not leave out are in the checkpoint."""
    path = run.path("kept.ckpt")
    module = Net(batches=2)
    module.enter.requires_grad_(False)
    trainer = fit(run, module, Probe(save=(2, path)), max_epochs=1)
    state = read_checkpoint(path)["state_dict"]
    assert state.keys() == Net().state_dict().keys()
    assert torch.equal(state["enter.weight"], Net().enter.weight)
    file = run.path("kept.safetensors")
    engine_of(trainer).save_weights(file)
    engine_of(trainer).load_weights(file)
    assert torch.equal(dict(engine_of(trainer).named_full_weights())["enter.weight"], Net().enter.weight)


def built_late(run):
    """A module whose layers are made in `configure_model`, under the strategy's own initialisation."""
    trainer = fit(run, Late(batches=3), Probe(limit=0.5), max_epochs=1)
    run.compare("late-weights", float_weights(trainer), 2e-5)


class Late(Net):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.head = None

    def configure_model(self):
        if self.head is None:
            torch.manual_seed(2)
            self.head = nn.Linear(11, 3)


def engines_keep_no_model_alive(run):
    trainer = fit(run, Net(batches=1), Probe(limit=0.5), max_epochs=1)
    strategy = weakref.ref(trainer.strategy)
    del trainer
    gc.collect()
    assert strategy() is None


def not_finite(run):
    """A norm of a NaN gradient is not finite, on every rank. DeepSpeed then skips an fp32 step by itself."""
    probe = Probe(limit=1.0)
    trainer = fit(run, Net(batches=3, poison=1), probe, max_epochs=1)
    assert torch.tensor(probe.norms[0]).isfinite()
    assert not torch.tensor(probe.norms[1]).isfinite()
    clean = all(value.isfinite().all() for value in float_weights(trainer).values())
    assert clean == run.engine.startswith("zero")


def evaluation_only(run):
    """Testing without a fit, from a checkpoint, and after a fit."""
    path = run.path("tested.ckpt")
    module = Net(batches=3)
    trainer = fit(run, module, Probe(save=(3, path)), max_epochs=1)
    trained = weights_of(trainer)
    after = trainer.test(module, verbose=False)[0]["test/loss"]
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, trained[name]), name
    fresh = run.trainer().test(Net(), ckpt_path=str(path), verbose=False)[0]["test/loss"]
    assert abs(after - fresh) < 1e-6, (after, fresh)
    run.compare("tested", {"loss": torch.tensor(after)}, 1e-4)


def single_file(run):
    """A file without the frozen weights, as an ensemble is, is tested strictly, by a fresh and by a trained module."""
    path, wrong = run.path("single.ckpt"), run.path("wrong.ckpt")
    trainer = fit(run, Adapted(batches=3), Probe(), max_epochs=1)
    state = weights_of(trainer)
    expected = trainer.test(trainer.lightning_module, verbose=False)[0]["test/loss"]
    if run.rank == 0:
        rest = {"pytorch-lightning_version": L.__version__, "hyper_parameters": {}}
        torch.save({"state_dict": state, **rest}, path)
        torch.save({"state_dict": {**state, "stranger": torch.zeros(1)}, **rest}, wrong)
    trainer.strategy.barrier()
    further = fit(run, Adapted(batches=5), Probe(), max_epochs=1)
    assert abs(further.test(further.lightning_module, verbose=False)[0]["test/loss"] - expected) > 1e-4
    module = Adapted()
    for tested, by in ((further, further.lightning_module), (run.trainer(), module)):
        found = tested.test(by, ckpt_path=str(path), verbose=False)[0]["test/loss"]
        assert abs(found - expected) < 1e-6, (found, expected)
    assert abs(run.trainer().test(module, verbose=False)[0]["test/loss"] - expected) < 1e-6
    with pytest.raises((CheckpointError, RuntimeError), match="stranger"):
        run.trainer().test(Adapted(), ckpt_path=str(wrong), verbose=False)


def single_file_fit(run):
    """ZeRO cannot resume from a file, and says why; the optimizer's state in it is that of one device."""
    path = run.path("single.ckpt")
    if run.rank == 0:
        torch.save({"state_dict": Net().state_dict(), "pytorch-lightning_version": L.__version__}, path)
    with pytest.raises(CheckpointError, match="whose optimizer state ZeRO cannot divide"):
        fit(run, Net(batches=1), Probe(), ckpt_path=path, max_epochs=1)


def damaged(run):
    """A checkpoint that lacks a file's end, or a file, is refused by name."""
    path = run.path("broken.ckpt")
    trainer = fit(run, Net(batches=1), Probe(save=(1, path)), max_epochs=1)
    if run.rank == 0:
        largest = max(shards(path), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    trainer.strategy.barrier()
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoint(path)
    trainer.strategy.barrier()
    if run.rank == 0:
        shards(path)[-1].unlink()
    trainer.strategy.barrier()
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoint(path)


def shards(path: Path) -> list[Path]:
    suffixes = (".pt", ".distcp", ".ckpt")
    return sorted(file for file in [path, *path.rglob("*")] if file.is_file() and file.suffix in suffixes)


# -- vetoes --------------------------------------------------------------------------------------------------------


class PoisonedRank(Net):
    """One batch is not finite, on the last rank only."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        last = ranks()[0] == ranks()[1] - 1
        return loss * float("nan") if index == self.bad and last else loss


class Guard(L.Callback):
    """Vetoes steps by number, or those whose norm is not finite; notes what the engine says and what moved."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.applied: list[bool] = []
        self.moved: list[bool] = []
        self.scalers: list[dict] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module):
        assert not engine_of(trainer).was_step_applied()
        self.before = float_weights(trainer)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine = engine_of(trainer)
        assert engine.is_optimizer_step()
        bad = trainer.global_step in self.steps if self.steps else not engine.gradient_norm(optimizer).isfinite()
        self.scalers.append(scaler_state(trainer))
        if bad:
            engine.veto_step(optimizer)
            engine.veto_step(optimizer)  # two tricks may agree
        assert engine.gradient_norm(optimizer) != 0  # what it was before the veto

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if trainer.global_step == len(self.applied) or trainer.fit_loop._should_accumulate():
            return
        now = float_weights(trainer)
        self.applied.append(engine_of(trainer).was_step_applied())
        self.moved.append(any(not torch.equal(now[name], self.before[name]) for name in now))
        self.before = now


def scaler_state(trainer) -> dict:
    """Everything that the loss scaler remembers."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        return dict(scaler.state_dict())
    optimizer = getattr(trainer.strategy.model, "optimizer", None)
    return dict(vars(optimizer.loss_scaler)) if hasattr(optimizer, "loss_scaler") else {}


def vetoed(run):
    """A window that is NaN on one rank is dropped on all, as if its batches had not been: AdamW, no hang."""
    module, guard = PoisonedRank(batches=12), Guard()
    module.bad = 4  # the first batch of the third window
    trainer = fit(run, module, Probe(), max_epochs=1, accumulate_grad_batches=2, callbacks=[guard])
    assert guard.applied == guard.moved == [True, True, False, True, True, True]
    assert trainer.global_step == 6
    if run.is_reference:
        for name, value in float_weights(trainer).items():
            if name != "offset":
                assert torch.allclose(value, left_out(2)[name], rtol=0, atol=1e-6), name
    run.compare("vetoed-weights", float_weights(trainer), 2e-5)


def left_out(window: int) -> dict[str, torch.Tensor]:
    """The same training in plain torch, without one window."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    batches = list(loader(12))
    for start in range(0, 12, 2):
        if start == 2 * window:
            continue
        optimizer.zero_grad()
        for inputs, targets in batches[start : start + 2]:
            (nn.functional.cross_entropy(net(inputs), targets) / 2).backward()
        optimizer.step()
    return {name: value.detach() for name, value in net.named_parameters()}


def vetoed_finite(run):
    """A finite step can be dropped too."""
    for precision in ("32-true", "bf16-mixed"):
        guard = Guard(1, 2)
        fit(run, Net(batches=4), Probe(), max_epochs=1, precision=precision, callbacks=[guard])
        assert guard.applied == guard.moved == [True, False, False, True], precision


def vetoed_unchecked(run):
    """In bf16, ZeRO-1 and 2 can be told not to look for overflow; a veto drops the step all the same."""
    from lightning_tricks.strategies import zero

    strategy, guard = zero(stage=int(run.engine[-1])), Guard(1)
    strategy.config["bf16"] = {"enabled": True, "check_grad_overflow": False}
    options = {"precision": "bf16-mixed", "strategy": strategy, "callbacks": [guard]}
    trainer = fit(run, Net(batches=3), Probe(), max_epochs=1, **options)
    assert guard.applied == guard.moved == [True, False, True]
    assert not getattr(trainer.strategy.model.optimizer, "check_grad_overflow", False)


def vetoed_scaled(run):
    """Under fp16 a veto leaves the loss scaler as it was, and a good step counts on."""
    guard = Guard(1, 2)
    trainer = fit(run, Net(batches=4, optimizer="sgd"), Probe(), max_epochs=1, callbacks=[guard], **fp16_options(run))
    assert guard.applied == guard.moved == [True, False, False, True]
    first, second, third, fourth = guard.scalers
    assert first != second == third == fourth != scaler_state(trainer)


def scaler_skips(run):
    """Gradients that are not finite under fp16: the scaler skips and backs off, vetoed or not; the engine says so."""
    states = []
    for guard in (Guard(), Guard(99)):
        module = PoisonedRank(batches=3, optimizer="sgd")
        module.bad = 1
        fit(run, module, Probe(), max_epochs=1, callbacks=[guard], **fp16_options(run))
        assert guard.applied == guard.moved == [True, False, True]
        assert guard.scalers[2] != guard.scalers[1]
        states.append(guard.scalers)
    assert states[0] == states[1]


# -- norms of groups -----------------------------------------------------------------------------------------------


def groups_of(module: nn.Module) -> dict[str, list[str]]:
    """By top-level module, which is a partition; then a mixed bag, a repeated one and an empty one."""
    groups: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name.partition(".")[0], []).append(name)
    return groups | {"mixed": ["enter.weight", "head.bias"], "twice": ["head.bias"] * 2, "empty": []}


class GroupNorms(Probe):
    """Records the norms of groups, and holds them against the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        groups = groups_of(pl_module)
        norms = engine_of(trainer).gradient_norms(optimizer, groups)
        assert list(norms) == list(groups)
        assert all(norm.dtype == torch.float32 and norm.shape == () for norm in norms.values())
        whole_norm = torch.stack([norms[name] for name in ("enter", "blocks", "head") if name in norms]).norm()
        assert abs(float(whole_norm) / self.norms[-1] - 1) < (2e-3 if optimizer_is_low(trainer) else 1e-5)
        assert norms["empty"] == 0
        self.groups.append(torch.stack(list(norms.values())))


def optimizer_is_low(trainer) -> bool:
    return "16" in str(trainer.precision)


def group_norms(run):
    """The norms of named groups of one device, after accumulation."""
    probe = GroupNorms()
    fit(run, Net(batches=6), probe, max_epochs=1, accumulate_grad_batches=2)
    assert len(probe.groups) == 3
    run.compare("group-norms", {"norms": torch.stack(probe.groups)}, 1e-5)


def group_norms_frozen(run):
    """Frozen parameters and those without a gradient count as zero; a name that is none is told."""
    probe = GroupNorms()
    trainer = fit(run, Adapted(batches=2), probe, max_epochs=1)
    run.compare("group-norms-frozen", {"norms": torch.stack(probe.groups)}, 1e-5)
    with pytest.raises(MisconfigurationError, match=r"`head.wight` is no parameter of \w*Adapted"):
        engine_of(trainer).gradient_norms(trainer.optimizers[0], {"head": ["head.wight"]})


def group_norms_low(run):
    """In bf16 and, unscaled, in fp16."""
    for options in ({"precision": "bf16-mixed"}, fp16_options(run)):
        probe = GroupNorms()
        fit(run, Net(batches=2, optimizer="sgd"), probe, max_epochs=1, **options)
        run.compare(f"group-norms-{run_name(options)}", {"norms": torch.stack(probe.groups)}, 5e-2)


def run_name(options: dict) -> str:
    return "bf16" if options.get("precision") == "bf16-mixed" else "fp16"


def group_norms_bad(run):
    """NaN on one rank, and a vetoed step: not finite on any rank."""
    seen = {}

    class Asks(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            engine = engine_of(trainer)
            if trainer.global_step == 2:
                engine.veto_step(optimizer)
            seen[trainer.global_step] = engine.gradient_norms(optimizer, {"head": ["head.weight"]})["head"]
            if trainer.global_step == 1:
                engine.veto_step(optimizer)

    module = PoisonedRank(batches=3)
    module.bad = 1
    fit(run, module, Probe(), max_epochs=1, callbacks=[Asks()])
    assert [bool(seen[step].isfinite()) for step in range(3)] == [True, False, False]


# -- shards --------------------------------------------------------------------------------------------------------


class Scored(Net):
    """Keeps the loss of each validation, computed as the strategy computes."""

    def validation_step(self, batch, index):
        self.log("val", nn.functional.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)

    def val_dataloader(self):
        return loader(2)


class Swap(L.Callback):
    """Validates on the weights of the first step, and puts the raw ones back."""

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.first: dict[str, torch.Tensor] = {}
        self.full: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if trainer.global_step == 1:
            self.first = shards_of(trainer)
            self.full = weights_of(trainer)
            assert_tiled(trainer, self.first, self.full)

    def on_validation_start(self, trainer, pl_module):
        if self.active:
            self.raw, self.raw_full = shards_of(trainer), weights_of(trainer)
            engine_of(trainer).put_shards(self.first)

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["val"]))
        if self.active:
            same(trained(trainer), self.full)
            engine_of(trainer).put_shards(self.raw)
            same(shards_of(trainer), self.raw)
            same(trained(trainer), self.raw_full)


def shards_of(trainer) -> dict[str, torch.Tensor]:
    return {shard.name: shard.values.clone() for shard in engine_of(trainer).named_shards()}


def trained(trainer) -> dict[str, torch.Tensor]:
    names = {name for name, parameter in trainer.lightning_module.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in weights_of(trainer).items() if name in names}


def same(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name


def assert_tiled(trainer, copies: dict[str, torch.Tensor], full: dict[str, torch.Tensor]) -> None:
    """The ranks' shards together are the whole weights, each element once, or once a rank where ranks are replicas."""
    engine = engine_of(trainer)
    shards = {shard.name: shard for shard in engine.named_shards()}
    assert shards.keys() == copies.keys() <= full.keys()
    for name in trained(trainer):
        total, count = torch.zeros(full[name].numel()), torch.zeros(full[name].numel())
        if name in shards:
            shard = shards[name]
            assert shard.shape == full[name].shape
            assert shard.values.dtype == torch.float32
            total[shard.start : shard.stop] = copies[name]
            count[shard.start : shard.stop] = 1
        total, count = engine.sum_over_ranks(total), engine.sum_over_ranks(count)
        replicas = getattr(trainer.strategy, "_replicas", 1)
        copies_of_each = engine.world_size if engine.name in ("one_device", "ddp") else replicas
        assert (count == copies_of_each).all(), name
        assert torch.equal(total / copies_of_each, full[name].flatten()), name


def shards_swapped(run):
    """Other weights for a validation, then the raw ones: scores are theirs, training goes on bit for bit."""
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 5e-3)):
        swapped, plain = Swap(), Swap(active=False)
        options = {"max_epochs": 2, "precision": precision}
        first = fit(run, Scored(batches=4), Probe(), callbacks=[swapped], **options)
        second = fit(run, Scored(batches=4), Probe(), callbacks=[plain], **options)
        same(float_weights(first), float_weights(second))
        net = Scored()
        net.load_state_dict(swapped.full)
        inputs, targets = loader(2).dataset.tensors
        expected = float(nn.functional.cross_entropy(net(inputs), targets))
        assert len(swapped.losses) == 2
        assert all(abs(loss / expected - 1) < tolerance for loss in swapped.losses), (
            precision,
            swapped.losses,
            expected,
        )
        assert all(abs(loss / expected - 1) > tolerance for loss in plain.losses), (precision, plain.losses, expected)


def shards_frozen(run):
    """Frozen parameters have no shards, and stay."""
    module = Adapted(batches=2)
    trainer = fit(run, module, Probe(), max_epochs=1)
    shards = shards_of(trainer)
    assert not any(name.startswith(("enter", "blocks.0")) for name in shards)
    engine_of(trainer).put_shards({name: torch.full_like(value, 2.0) for name, value in shards.items()})
    assert all((value == 2.0).all() for value in trained(trainer).values())
    assert torch.equal(whole(module.enter.weight), Net().enter.weight)


def shards_misfit(run):
    """Values that do not fit on one rank are refused on every rank, and nothing is written."""
    trainer = fit(run, Net(batches=1), Probe(), max_epochs=1)
    before = weights_of(trainer)
    for spoil in (lambda values: values.popitem(), lambda values: values.update(stranger=torch.zeros(1))):
        values = {name: torch.zeros_like(value) for name, value in shards_of(trainer).items()}
        if run.rank == run.world - 1:
            spoil(values)
        with pytest.raises(MisconfigurationError, match=r"do not fit: (those of another rank|`.*` is )"):
            engine_of(trainer).put_shards(values)
    same(weights_of(trainer), before)


def shards_after_test(run):
    """After an evaluation there are no masters: the shards are of the weights that the evaluation used."""
    module = Net(batches=2)
    trainer = fit(run, module, Probe(), max_epochs=1)
    kept = trained(trainer)
    score = trainer.test(module, verbose=False)[0]["test/loss"]
    shards = shards_of(trainer)
    engine_of(trainer).put_shards({name: torch.zeros_like(value) for name, value in shards.items()})
    assert not any(value.any() for value in trained(trainer).values())
    engine_of(trainer).put_shards(shards)
    same(trained(trainer), kept)
    path = run.path("after-test.safetensors")
    engine_of(trainer).save_weights(path)
    engine_of(trainer).put_shards({name: torch.zeros_like(value) for name, value in shards.items()})
    engine_of(trainer).load_weights(path)
    same(trained(trainer), kept)
    assert trainer.test(module, verbose=False)[0]["test/loss"] == score


def shards_cut_otherwise(run):
    """A parameter cut along another dimension has no place in the flattened whole: refused by name."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=run.world, tensor_parallel_size=1)
    trainer = fit(run, CutAcross(batches=1), Probe(), max_epochs=1, strategy=strategy)
    with pytest.raises(
        UnsupportedError, match=r"`enter.weight` is not cut along its first .* `named_full_weights\(\)`"
    ):
        shards_of(trainer)
    assert weights_of(trainer)["enter.weight"].shape == (11, 6)


class CutAcross(Net):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.enter, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
        for module in (*self.blocks, self.head):
            fully_shard(module, mesh=mesh)


def offloaded(run):
    """With the optimizer on the CPU: norms of groups, a veto and a swap all the same."""
    from lightning_tricks.strategies import zero

    norms, swap = GroupNorms(), Swap()
    for callbacks, batches in (([norms], 2), ([swap], 4), ([guard := Guard(1)], 3)):
        strategy = zero(stage=int(run.engine[-1]))
        strategy.config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        trainer = fit(run, Scored(batches=batches), Probe(), max_epochs=1, strategy=strategy, callbacks=callbacks)
        optimizer = trainer.strategy.model.optimizer
        assert optimizer.offload_optimizer if run.engine == "zero_3" else optimizer.cpu_offload
    assert len(norms.groups) == 2
    assert len(swap.losses) == 1
    assert guard.applied == guard.moved == [True, False, True]
