"""Checkpoints of adapted modules: small, strict, and of one base only."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_tricks.errors import CheckpointError
from tests.mixins.models import QUIET, Classifier, Encoder, trainer

pytestmark = QUIET

TRAINED = {f"encoder.layer.{i}.{name}.lora_{ab}" for i in (0, 1) for name in ("query", "value") for ab in "AB"} | {
    "head.weight",
    "head.bias",
}
BUFFERS = {"encoder.layer.0.gain", "encoder.layer.1.gain"}


def fit(path, model=None, **options):
    model = model or Classifier()
    ours = trainer(**options)
    ours.fit(model)
    ours.save_checkpoint(path)
    return model


def assert_equal_weights(one, other):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_hold_what_is_trained_and_the_buffers(tmp_path):
    fit(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == TRAINED | BUFFERS
    base = set(checkpoint["lightning_tricks"]["base"])
    assert base == {name for name, _ in Classifier().named_parameters()} - TRAINED


def test_load_strictly_onto_the_same_base(tmp_path):
    model = fit(tmp_path / "a.ckpt", Classifier(trainable=("pooler",)))
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", strict=True)
    assert_equal_weights(loaded, model)


def test_resuming_equals_going_on(tmp_path):
    model = Classifier()
    interrupted = copy.deepcopy(model)
    trainer(max_steps=-1, max_epochs=2).fit(model)
    fit(tmp_path / "half.ckpt", interrupted, max_steps=-1, max_epochs=1)
    resumed = Classifier()
    trainer(max_steps=-1, max_epochs=2).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert_equal_weights(resumed, model)


@pytest.mark.parametrize("key", ["encoder.layer.0.query.lora_A", "head.bias", "encoder.layer.1.gain"])
def test_a_trained_or_buffer_entry_that_is_missing_is_an_error(key):
    model = Classifier()
    state = model.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surprise"):
        model.load_state_dict({**model.state_dict(), "surprise": torch.zeros(1)})


def test_a_full_state_dict_loads_as_well():
    model, other = Classifier(), Classifier(base_seed=1)
    model.load_state_dict({**model.state_dict(), **dict(other.named_parameters()), **dict(other.named_buffers())})
    assert_equal_weights(model, other)


def test_inside_another_module():
    """The keys then have a prefix, and the frozen ones of the other module count."""
    pair = torch.nn.ModuleDict({"teacher": Classifier(), "student": torch.nn.Linear(2, 2)})
    state = pair.state_dict()
    assert "teacher.encoder.pooler.weight" not in state
    assert "teacher.head.weight" in state
    pair.load_state_dict(state)
    del state["student.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "student.weight"\. $'):
        pair.load_state_dict(state)


def test_compiled_modules_have_their_names_dropped_too():
    model = Classifier()
    state = torch.compile(model, backend="eager").state_dict()
    assert set(state) == {f"_orig_mod.{name}" for name in TRAINED | BUFFERS}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_seed": 1}, r"`encoder\.layer\.0\.query\.weight` is not the tensor that this checkpoint was trained on"),
        ({"alpha": 8.0}, r"`encoder` was adapted with alpha=4 in this checkpoint, here with alpha=8"),
        ({"rank": 4}, r"`encoder` was adapted with rank=2 in this checkpoint, here with rank=4"),
        ({"trainable": ("pooler",)}, r"trained beside a frozen `encoder\.pooler\.weight`"),
    ],
)
def test_another_base_or_other_options_are_refused(tmp_path, options, message):
    fit(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        Classifier.load_from_checkpoint(tmp_path / "a.ckpt", **options)
    with pytest.raises(CheckpointError, match=message):
        trainer(max_steps=6).fit(Classifier(**options), ckpt_path=tmp_path / "a.ckpt")


def test_the_first_tensor_that_differs_is_named(tmp_path):
    fit(tmp_path / "a.ckpt")
    model = Classifier()
    with torch.no_grad():
        model.encoder.layer[1].norm.bias[3] += 1e-6
        model.encoder.pooler.bias.zero_()
    with pytest.raises(CheckpointError, match=r"^`encoder\.layer\.1\.norm\.bias` is not the tensor"):
        trainer().fit(model, ckpt_path=tmp_path / "a.ckpt")


def test_a_part_that_the_checkpoint_knows_nothing_of_is_refused(tmp_path):
    fit(tmp_path / "a.ckpt", Classifier())
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["lightning_tricks"]["base"]["encoder.pooler.bias"]
    with pytest.raises(CheckpointError, match=r"`encoder\.pooler\.bias` is neither in this checkpoint nor in the base"):
        Classifier().on_load_checkpoint(checkpoint)


def test_a_checkpoint_that_does_not_say_is_loaded_with_a_warning(tmp_path):
    fit(tmp_path / "a.ckpt", Classifier())
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["lightning_tricks"]
    with pytest.warns(UserWarning, match="does not say which base"):
        Classifier().on_load_checkpoint(checkpoint)


def test_a_base_trained_at_bf16_is_the_same_base(tmp_path):
    """`bf16-true` casts the base itself; what was trained on it loads onto the fp32 base, and no other."""
    fit(tmp_path / "a.ckpt", precision="bf16-true")
    Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"query\.weight` is not the tensor"):
        Classifier.load_from_checkpoint(tmp_path / "a.ckpt", base_seed=1)


def test_weights_given_after_adapting_are_the_base(tmp_path):
    """What counts is what was trained on, not what stood there when `adapt` was called."""
    model = Classifier(base_seed=0)
    with torch.no_grad():
        for name, parameter in Classifier(base_seed=1).named_parameters():
            model.get_parameter(name).copy_(parameter)
    fit(tmp_path / "a.ckpt", model)
    Classifier.load_from_checkpoint(tmp_path / "a.ckpt", base_seed=1)


def test_weights_replaced_between_runs_are_the_base(tmp_path):
    """A fingerprint of before, taken when a checkpoint was written, must not outlive the weights."""
    model = fit(tmp_path / "a.ckpt")
    model.encoder.load_state_dict({**model.encoder.state_dict(), **Encoder(seed=1).state_dict()})
    fit(tmp_path / "b.ckpt", model)
    Classifier.load_from_checkpoint(tmp_path / "b.ckpt", base_seed=1)
    with pytest.raises(CheckpointError):
        Classifier.load_from_checkpoint(tmp_path / "b.ckpt")


def test_unfrozen_later_is_saved_from_then_on():
    model = Classifier()
    model.encoder.pooler.requires_grad_(True)
    assert {"encoder.pooler.weight", "encoder.pooler.bias"} <= set(model.state_dict())


class HeadOnly(Classifier):
    """The same encoder, frozen without adapters."""

    def __init__(self, base_seed: int = 0) -> None:
        LightningModule.__init__(self)
        self.encoder, self.head = Encoder(base_seed), torch.nn.Linear(6, 4)
        self.freeze_base(self.encoder)


def test_a_frozen_module_is_left_out_and_recognised_all_the_same(tmp_path):
    model = fit(tmp_path / "head.ckpt", HeadOnly())
    state = torch.load(tmp_path / "head.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"head.weight", "head.bias"} | BUFFERS
    assert_equal_weights(HeadOnly.load_from_checkpoint(tmp_path / "head.ckpt", strict=True), model)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.query\.weight"):
        HeadOnly.load_from_checkpoint(tmp_path / "head.ckpt", base_seed=1)
