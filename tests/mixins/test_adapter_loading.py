"""Loading and exporting adapters: what would silently mean something else is refused, and a refusal changes nothing."""

import copy

import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins import IA3, AdapterFusion, Bottleneck, LoRA, PrefixTuning, PromptTuning
from lightning_tricks.storage import WeightsFile, write_weights
from tests.mixins.models import Encoder, Holder, moved
from tests.mixins.test_prompts import decoder

pytestmark = pytest.mark.filterwarnings("ignore:.*float.*")


def fused():
    model = Holder(Encoder(), Bottleneck(width=2, targets=("query",)), name="one")
    model.adapt(model.net, Bottleneck(width=2, targets=("query",)), name="two")
    model.adapt(model.net, AdapterFusion(adapters=("one", "two")), name="both")
    return model


NOT_IN_WEIGHTS = {
    "Bottleneck": lambda: Holder(Encoder(), Bottleneck(width=2, targets=("query",))),
    "AdapterFusion": fused,
    "PromptTuning": lambda: Holder(decoder(), PromptTuning(tokens=2)),
    "PrefixTuning": lambda: Holder(decoder(), PrefixTuning(tokens=2)),
}


@pytest.mark.parametrize("method", NOT_IN_WEIGHTS)
def test_a_merged_export_leaves_no_adapter_out_in_silence(method, tmp_path):
    model = NOT_IN_WEIGHTS[method]()
    with pytest.raises(MisconfigurationError, match=f"{method} cannot be merged, and a file of plain weights would"):
        model.export_merged(tmp_path / "merged.safetensors", module=model.net)
    assert not list(tmp_path.iterdir())
    with model.adapters_disabled():
        model.export_merged(tmp_path / "base.safetensors", module=model.net)
    assert not any("bottlenecks" in name or "prompts" in name for name in WeightsFile(next(tmp_path.iterdir())).names)


def test_nobody_is_sent_to_an_export_that_cannot_be(tmp_path):
    with pytest.raises(MisconfigurationError, match=r"peft has no Bottleneck.* keep a checkpoint\.$"):
        NOT_IN_WEIGHTS["Bottleneck"]().save_adapter(tmp_path)


# -- a name that exists ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    moved(Holder(Encoder(), LoRA(rank=2, alpha=4))).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


OTHER_MEANINGS = {
    "alpha": (LoRA(rank=2, alpha=8), r"scales the update of `layer\.0\.query` by 2 \(rank 2, alpha 4\).* by 4 here"),
    "rslora": (LoRA(rank=2, alpha=4, rslora=True), r"by 2 \(rank 2, alpha 4\).* by 2\.82843 here \(.*rslora\)"),
    "one layer": (LoRA(rank=2, alpha={"value": 5.0, "*": 4.0}), r"`layer\.0\.value` by 2 .* by 2\.5 here"),
    "places": (
        LoRA(rank=2, alpha=4, targets=("query",)),
        r"for `layer\.0\.value\.lora_A`, for which there is no place",
    ),
    "more": (LoRA(rank=2, alpha=4, targets=("query", "value", "pooler")), r"lacks the tensor for `pooler\.lora_A`"),
    "pissa": (LoRA(rank=2, alpha=4, init="pissa"), r"plain LoRA of `layer\.0\.query`.*'default' subtracts a start"),
    "parts": (LoRA(rank=2, alpha=4, targets=("query:0-6", "value")), r"of `layer\.0\.query`.*'default' changes parts"),
}


@pytest.mark.parametrize("what", OTHER_MEANINGS)
def test_values_that_would_mean_something_else_under_a_name_are_refused(folder, what):
    policy, message = OTHER_MEANINGS[what]
    model = moved(Holder(Encoder(), policy))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(folder, module=model.net)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_which_side_is_rescaled_is_compared(tmp_path):
    Holder(Encoder(), IA3(targets=("query", "value"))).save_adapter(tmp_path)
    model = Holder(Encoder(), IA3(targets=("query",), feedforward=("value",)))
    with pytest.raises(CheckpointError, match=r"rescales the outputs of `layer\.0\.value`, and 'default' its inputs"):
        model.load_adapter(tmp_path, module=model.net)


def test_an_adapter_at_rest_that_is_loaded_has_its_say(folder):
    model = Holder(Encoder(), LoRA(rank=2, alpha=4))
    model.adapt(model.net, LoRA(rank=3, targets=("query",)), name="other")
    model.load_adapter(folder, module=model.net)
    assert model.active_adapters == {"default": 1.0}
    assert not model.net.layer[0].query.lora_A_other.requires_grad
    assert model.net.layer[0].query.lora_A.requires_grad


# -- a refusal changes nothing ---------------------------------------------------------------------------------------


def rewritten(folder, change):
    path = folder / "adapter_model.safetensors"
    file = WeightsFile(path)
    tensors = change({name: file.tensor(name) for name in file.names})
    write_weights(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.items())


DAMAGES = {
    "a tensor less": lambda tensors: {k: t for k, t in tensors.items() if "1.value.lora_B" not in k},
    "a shape": lambda tensors: {k: t[:4] if "1.value.lora_B" in k else t for k, t in tensors.items()},
    "a place": lambda tensors: {k.replace("1.value.lora_B", "1.value.lora_magnitude"): t for k, t in tensors.items()},
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_folder_that_does_not_fit_changes_nothing(folder, what):
    rewritten(folder, DAMAGES[what])
    model = Holder(Encoder())
    classes = [type(m) for m in model.modules()]
    with pytest.raises((CheckpointError, MisconfigurationError)):
        model.load_adapter(folder, module=model.net)
    assert not model.adapter_names
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(Holder(Encoder()).state_dict())


@pytest.mark.parametrize("method", ["PromptTuning", "PrefixTuning"])
def test_a_prompt_of_another_width_changes_nothing(method, tmp_path):
    NOT_IN_WEIGHTS[method]().save_adapter(tmp_path)
    rewritten(tmp_path, lambda tensors: {k: t[:, :3] for k, t in tensors.items()})
    (tmp_path / "lightning_tricks.json").unlink()
    model = Holder(decoder())
    with pytest.raises(CheckpointError, match=r"has the shape \[2, 3\], and this module's has \[2, "):
        model.load_adapter(tmp_path, module=model.net)
    assert not hasattr(model.net, "prompts")
    assert all(p.requires_grad for p in model.parameters())


# -- modules that go along -------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    for name in ("one", "two"):
        model = moved(Holder(Encoder(), LoRA(rank=2), trainable=("pooler",)))
        with torch.no_grad():
            model.net.pooler.weight.normal_()
        model.save_adapter(tmp_path / name)
    return tmp_path


def test_a_second_folder_does_not_replace_what_the_first_ones_adapter_shares(two):
    model = Holder(Encoder())
    model.load_adapter(two / "one", module=model.net, name="one")
    before = model.net.pooler.weight.clone()
    with pytest.raises(CheckpointError, match=r"holds `pooler\.weight` besides .* the one of 'one' too"):
        model.load_adapter(two / "two", module=model.net, name="two")
    assert torch.equal(model.net.pooler.weight, before)
    assert model.adapter_names == ("one",)
    model.load_adapter(two / "one", module=model.net, name="again")  # the same values harm nobody
    model = Holder(Encoder(), LoRA(rank=2))
    with pytest.raises(CheckpointError, match=r"holds `pooler\.weight` besides .* frozen beside 'default'"):
        model.load_adapter(two / "one", module=model.net)


# -- parts of fused projections --------------------------------------------------------------------------------------


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        return self.qkv(x)


@pytest.mark.parametrize("targets", [("qkv:q,v",), ("qkv:k",)])
def test_pissa_of_parts_starts_at_each_parts_principal_part(targets, tmp_path):
    base, x = Fused(), torch.randn(5, 12)
    model = Holder(copy.deepcopy(base), LoRA(rank=2, alpha=3, targets=targets, init="pissa"))
    torch.testing.assert_close(model.net(x), base(x), rtol=1e-5, atol=1e-6)
    layer = model.net.qkv
    scale, start = 3 / 2, 0
    for number, (first, last) in enumerate(layer.adapters["default"].slices):
        left, values, right = torch.linalg.svd(base.qkv.weight[first:last].double())
        expected = left[:, :2] * values[:2] @ right[:2]
        product = layer.lora_B[:, start : start + 12].t() @ layer.lora_A[2 * number : 2 * number + 2] * scale
        torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-5)
        start += 12
    with torch.no_grad():
        layer.lora_B.add_(torch.randn_like(layer.lora_B))
    changed = (model.net(x) - base(x)).abs().amax(0).view(3, 12).amax(1) > 1e-3
    assert changed.tolist() == [part in targets[0] for part in (":q", ":k", ",v")]
    model.save_adapter(tmp_path)
    loaded = Holder(base)
    loaded.load_adapter(tmp_path, module=loaded.net)
    torch.testing.assert_close(loaded.net(x), model.net(x), rtol=1e-5, atol=1e-5)
    expected = model.net(x)
    model.merge_adapters()
    torch.testing.assert_close(model.net(x), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_other_parts_is_refused():
    base, checkpoint = Fused(), {}
    trained = Holder(copy.deepcopy(base), LoRA(rank=2, targets=("qkv:q,v",)))
    trained.on_save_checkpoint(checkpoint)
    for targets, here in ((("qkv:q,k",), "0-12,12-24"), (("qkv",), "all")):
        other = Holder(copy.deepcopy(base), LoRA(rank=2, targets=targets))
        with pytest.raises(CheckpointError, match=rf"at the outputs 0-12,24-36 of `qkv` in this .*, here at {here}"):
            other.on_load_checkpoint(checkpoint)
    for held in checkpoint["lightning_tricks"]["adapters"].values():
        del held["default"]["parts"]  # as it was once
    trained.on_load_checkpoint(checkpoint)
