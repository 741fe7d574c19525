import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_tricks.engines import engine_of, ranks, read_checkpoint, whole
from lightning_tricks.engines._gradients import global_norm, scale_to_norm
from lightning_tricks.errors import CheckpointError, MisconfigurationError, UnsupportedError
from tests.engines.checks import Net

CPU = torch.device("cpu")


def quiet(*callbacks, **options):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "max_steps": 2}
    return L.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


class Clipper(L.Callback):
    def setup(self, trainer, pl_module, stage):
        engine_of(trainer).claim_gradient_clipping(type(self).__name__)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        engine_of(trainer).clip_gradient_norm(optimizer, 0.5)


class OtherClipper(Clipper):
    pass


# -- selection -----------------------------------------------------------------------------------------------------


def test_one_device():
    trainer = quiet()
    engine = engine_of(trainer)
    assert (engine.name, engine.rank, engine.world_size) == ("one_device", 0, 1)
    assert engine_of(trainer) is engine
    assert ranks() == (0, 1)
    assert engine.is_optimizer_step()
    assert engine.broadcast([1]) == [1]


def test_foreign_trainer_is_told_apart():
    foreign = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})()
    with pytest.raises(
        MisconfigurationError, match=r"pytorch_lightning Trainer; lightning_tricks needs lightning\.pytorch"
    ):
        engine_of(foreign)
    with pytest.raises(MisconfigurationError, match="got str"):
        engine_of("trainer")


def test_strategy_without_an_engine_is_refused():
    class Other(type(quiet().strategy).__mro__[1]):  # Lightning's abstract Strategy
        pass

    trainer = quiet()
    Other.__abstractmethods__ = frozenset()
    trainer._accelerator_connector.strategy = Other()
    with pytest.raises(UnsupportedError, match=r"Other: the suite has no engine .* use `strategy='fsdp2'`"):
        engine_of(trainer)


# -- gradients -----------------------------------------------------------------------------------------------------


def test_norm_is_torchs():
    gradients = [torch.randn(7, 3), torch.randn(5), torch.zeros(2)]
    assert torch.allclose(global_norm(gradients, CPU), torch.nn.utils.get_total_norm(gradients))


def test_norm_of_low_precision_gradients_is_fp32():
    gradients = [torch.full((4096,), 0.1, dtype=torch.bfloat16)] * 4
    norm = global_norm(gradients, CPU)
    exact = torch.cat(gradients).double().norm()
    assert norm.dtype == torch.float32
    assert norm.double() == pytest.approx(float(exact), rel=1e-5)


def test_norm_without_gradients_is_zero():
    assert global_norm([], CPU) == 0


def test_sparse_gradients_count_and_are_scaled():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    dense = torch.randn(3)
    expected = torch.cat([embedding.weight.grad.to_dense().flatten(), dense]).norm()
    gradients = [embedding.weight.grad, dense]
    norm = global_norm(gradients, CPU)
    assert torch.allclose(norm, expected)
    scale_to_norm(gradients, norm, 1.0)
    assert global_norm(gradients, CPU) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("limit", [0.7, torch.tensor(0.7)])
def test_scaling_is_torchs(limit):
    ours, theirs = (nn.Parameter(torch.zeros(9)) for _ in range(2))
    ours.grad = torch.randn(9) * 3
    theirs.grad = ours.grad.clone()
    scale_to_norm([ours.grad], ours.grad.norm(), limit)
    torch.nn.utils.clip_grad_norm_([theirs], 0.7)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_with_a_bad_norm_are_left_alone(bad):
    gradient = torch.tensor([1.0, bad])
    scale_to_norm([gradient], global_norm([gradient], CPU), 0.1)
    assert gradient[0] == 1.0


def test_small_gradients_are_left_alone():
    gradient = torch.tensor([0.3, 0.4])
    scale_to_norm([gradient], gradient.norm(), 1.0)
    assert torch.equal(gradient, torch.tensor([0.3, 0.4]))


def test_fused_optimizer_with_a_scaler_is_refused():
    class Fused(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=True)

    trainer = quiet(Clipper(), plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    with pytest.raises(UnsupportedError, match=r"fused AdamW .* pass `fused=False`"):
        trainer.fit(Fused())


def test_lbfgs_is_refused():
    class Closure(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(UnsupportedError, match="LBFGS: one step evaluates several gradients"):
        quiet(Clipper()).fit(Closure())


# -- claims --------------------------------------------------------------------------------------------------------


def test_trainer_that_clips_contradicts_a_claim():
    trainer = quiet(gradient_clip_val=0.25)
    with pytest.raises(MisconfigurationError, match=r"Clipper and `Trainer\(gradient_clip_val=0.25\)` both clip"):
        engine_of(trainer).claim_gradient_clipping("Clipper")


@pytest.mark.parametrize("second", [OtherClipper, Clipper])
def test_two_callbacks_that_clip_contradict(second):
    with pytest.raises(MisconfigurationError, match=r"Clipper and .*Clipper both clip"):
        quiet(Clipper(), second()).fit(Net())


def test_a_second_fit_may_claim_again():
    trainer = quiet(Clipper())
    trainer.fit(Net())
    trainer.fit(Net())
    assert trainer.global_step == 2


# -- weights -------------------------------------------------------------------------------------------------------


class Compiled(Net):
    """Holds a wrapper as `torch.compile` makes it, without compiling."""

    def __init__(self):
        super().__init__()
        wrapper = nn.Module()
        wrapper._orig_mod = self.enter
        self.enter = wrapper


class Strange(Net):
    def state_dict(self, *args, **kwargs):
        return {**super().state_dict(*args, **kwargs), "stranger": torch.zeros(1)}


def engine_for(module):
    trainer = quiet()
    trainer.strategy.connect(module)
    return engine_of(trainer)


def test_names_are_those_of_the_uncompiled_module(tmp_path):
    engine_for(Compiled()).save_weights(tmp_path / "compiled")
    plain = Net()
    with torch.no_grad():
        plain.enter.weight.zero_()
    engine_for(plain).load_weights(tmp_path / "compiled")
    assert torch.equal(plain.enter.weight, Net().enter.weight)


def test_full_weights_are_copies():
    module = Net()
    taken = dict(engine_for(module).named_full_weights())
    with torch.no_grad():
        module.enter.weight.zero_()
    assert taken["enter.weight"].any()


def test_tied_weights_come_back(tmp_path):
    module = Net()
    module.head.weight = module.tied = nn.Parameter(torch.ones(3, 11))
    engine = engine_for(module)
    engine.save_weights(tmp_path / "tied")
    with torch.no_grad():
        module.tied.zero_()
    engine.load_weights(tmp_path / "tied")
    assert module.head.weight is module.tied
    assert module.tied.all()


def test_state_that_is_no_parameter_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="holds `stranger`"):
        engine_for(Strange()).save_weights(tmp_path / "strange")


def test_whole_of_a_plain_parameter():
    parameter = nn.Parameter(torch.ones(2))
    assert torch.equal(whole(parameter), torch.ones(2))
    assert not whole(parameter).requires_grad


# -- reading -------------------------------------------------------------------------------------------------------


def test_read_checkpoint_is_single_precision_under_plain_names(tmp_path):
    state = {"net._orig_mod.weight": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor(3)}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}}, tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint["hyper_parameters"] == {"lr": 0.1}
    assert {name: tensor.dtype for name, tensor in checkpoint["state_dict"].items()} == {
        "net.weight": torch.float32,
        "count": torch.int64,
    }


def test_read_checkpoint_reads_weights_files(tmp_path):
    engine_for(Net()).save_weights(tmp_path / "net.safetensors", {"trick": "x"})
    checkpoint = read_checkpoint(tmp_path / "net.safetensors")
    Net().load_state_dict(checkpoint["state_dict"], strict=True)
    assert checkpoint["metadata"] == {"trick": "x"}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04half of a zip"])
def test_other_bytes_are_no_checkpoint(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt cannot be read .* Use another one"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_objects_are_not_unpickled(tmp_path):
    torch.save({"state_dict": {}, "callbacks": CPU.__class__, "x": CheckpointError}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_file_without_weights_is_no_checkpoint(tmp_path):
    torch.save({"global_step": 3}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="state_dict"):
        read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "absent.ckpt")
