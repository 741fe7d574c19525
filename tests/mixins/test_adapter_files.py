"""Adapter folders: peft loads ours, we load peft's, and what is wrong with a folder is named."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins import IA3, BitFit, DoRA, LoRA
from lightning_tricks.storage import WeightsFile
from tests.mixins.models import QUIET, Classifier, Encoder, Holder, moved, trainer
from tests.mixins.test_lora_layers import Convolutions, gpt2

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*float.*")]


def images():
    return torch.randn(2, 1, 8, 8)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.query, self.value = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.value(torch.tanh(self.query(self.table(x))))


def ids():
    return torch.randint(0, 9, (3, 4))


CASES = {
    "LoRA": (Table, ids, LoRA(rank=2, alpha=3, targets=("query", "value"), dropout=0.25)),
    "rsLoRA": (Table, ids, LoRA(rank=4, alpha=3, targets=("query", "value", "table"), rslora=True)),
    "ranks": (Table, ids, LoRA(rank={"query": 3, "*": 2}, alpha={"value": 5.0, "*": 2.0}, targets=("query", "value"))),
    "PiSSA": (Table, ids, LoRA(rank=2, alpha=3, targets=("query", "value"), init="pissa", rslora=True)),
    "parts": (Table, ids, LoRA(rank=2, alpha=3, targets=("query", "value:0-2,4-6"))),
    "convolutions": (Convolutions, images, LoRA(rank=2, alpha=3, targets=("first", "third", "out"))),
    "DoRA": (Table, ids, DoRA(rank=2, alpha=3, targets=("query", "value"))),
    "IA3": (Table, ids, IA3(targets=("query",), feedforward=("value",))),
}


def peft_load(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours_and_so_do_we(case, tmp_path):
    build, inputs, policy = CASES[case]
    base, x = build(), inputs()
    model = moved(Holder(copy.deepcopy(base), policy)).eval()
    model.save_adapter(tmp_path / "adapter")
    expected = model.net(x)
    assert (expected - base(x)).abs().max() > 1e-3
    torch.testing.assert_close(peft_load(copy.deepcopy(base), tmp_path / "adapter")(x), expected, rtol=1e-5, atol=1e-5)
    loaded = Holder(copy.deepcopy(base)).eval()
    loaded.load_adapter(tmp_path / "adapter", module=loaded.net, name="loaded")
    assert loaded.active_adapters == {"loaded": 1.0}
    torch.testing.assert_close(loaded.net(x), expected, rtol=1e-5, atol=1e-5)
    if case not in ("PiSSA", "parts"):
        again = Holder(copy.deepcopy(base), policy).eval()
        again.load_adapter(tmp_path / "adapter", module=again.net)
        assert torch.equal(again.net(x), expected)


@pytest.mark.parametrize("case", ["LoRA", "rsLoRA", "ranks", "DoRA", "IA3", "convolutions"])
def test_we_load_pefts(case, tmp_path):
    build, inputs, policy = CASES[case]
    base, x = build().eval(), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import IA3Config, LoraConfig, get_peft_model

        options = {
            "LoRA": {"r": 2, "lora_alpha": 3},
            "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True},
            "ranks": {"r": 2, "rank_pattern": {"query": 3}, "lora_alpha": 5, "alpha_pattern": {"qu.*": 2}},
            "DoRA": {"r": 2, "use_dora": True},
            "convolutions": {"r": 3},
        }
        if case == "IA3":
            config = IA3Config(target_modules=["query", "value"], feedforward_modules=["value"])
        else:
            config = LoraConfig(target_modules=list(policy.targets), **options[case])
        theirs = get_peft_model(copy.deepcopy(base), config).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "ia3_" in name:
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    model = Holder(base)
    model.load_adapter(tmp_path, module=model.net)
    model.eval()
    torch.testing.assert_close(model.net(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_trained_module_of_the_base_goes_along(tmp_path):
    base, x = Encoder(), torch.randn(3, 6)
    model = Holder(copy.deepcopy(base), LoRA(rank=2), trainable=("pooler",))
    with torch.no_grad():
        model.net.pooler.weight.normal_()
    model.save_adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["pooler"]
    torch.testing.assert_close(peft_load(copy.deepcopy(base), tmp_path)(x), model.net(x), rtol=1e-5, atol=1e-5)
    loaded = Holder(copy.deepcopy(base))
    loaded.load_adapter(tmp_path, module=loaded.net)
    assert torch.equal(loaded.net(x), model.net(x))
    assert loaded.net.pooler.weight.requires_grad
    half = Holder(Encoder(), LoRA(rank=2), trainable=("pooler.bias",))
    with pytest.raises(MisconfigurationError, match=r"`pooler\.bias` is trained, but not all of `pooler`"):
        half.save_adapter(tmp_path / "half")


def test_gpt2_goes_both_ways(tmp_path):
    base, x = gpt2(), torch.randint(0, 50, (2, 5))
    model = moved(Holder(copy.deepcopy(base), LoRA(rank=2, alpha=3, targets=("c_attn:q,v", "c_fc")))).eval()
    model.save_adapter(tmp_path)
    expected = model.net(input_ids=x)[0]
    theirs = peft_load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(input_ids=x)[0], expected, rtol=1e-5, atol=1e-5)
    loaded = Holder(copy.deepcopy(base)).eval()
    loaded.load_adapter(tmp_path, module=loaded.net)
    torch.testing.assert_close(loaded.net(input_ids=x)[0], expected, rtol=1e-5, atol=1e-5)


def test_another_base_is_refused_by_the_tensors_name(tmp_path):
    Holder(Encoder(), LoRA(rank=2)).save_adapter(tmp_path)
    other = Holder(Encoder(seed=1))
    with pytest.raises(CheckpointError, match=r"`layer\.0\.query\.weight` is not the tensor that the adapter in"):
        other.load_adapter(tmp_path, module=other.net)
    assert not other.adapter_names
    assert all(p.requires_grad for p in other.parameters()), "a refusal changes nothing"


@pytest.fixture
def folder(tmp_path):
    moved(Holder(Encoder(), LoRA(rank=2))).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder, *, dropped=(), added=()):
    from lightning_tricks.storage import write_weights

    path = folder / "adapter_model.safetensors"
    file = WeightsFile(path)
    tensors = {name: file.tensor(name) for name in file.names if not any(word in name for word in dropped)}
    tensors |= {name: torch.zeros(2) for name in added}
    write_weights(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.items())


def shorten(path):
    path.write_bytes(path.read_bytes()[:-40])


BROKEN = {
    "no folder": (shutil.rmtree, "there is no adapter folder"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "lacks `adapter_config.json`, and holds"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "lacks `adapter_model.safetensors`"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "not text": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds a list, not a JSON object"),
    "no type": (lambda f: (f / "adapter_config.json").write_text("{}"), "does not say `peft_type`"),
    "unknown type": (lambda f: edited(f, peft_type="BOFT"), "of the type 'BOFT', which is unknown here: known are IA3"),
    "an option": (lambda f: edited(f, use_qalora=True), "was made with use_qalora=True, which has no counterpart"),
    "another start": (lambda f: edited(f, init_lora_weights="pissa_niter_4"), "which changes the base itself"),
    "another rank": (lambda f: edited(f, r=5), "has the rank 2, and the configuration says 5"),
    "a target": (lambda f: edited(f, target_modules=["query", "key"]), "names the target 'key', and holds no tensors"),
    "truncated": (lambda f: shorten(f / "adapter_model.safetensors"), "it is truncated or damaged"),
    "a tensor less": (
        lambda f: without(f, dropped=["1.value.lora_B"]),
        r"lacks the tensor for `layer\.1\.value\.lora_B`",
    ),
    "no tensor": (lambda f: without(f, dropped=["lora"]), "holds no tensor of an adapter of the type LORA"),
    "a tensor more": (lambda f: without(f, added=["base_model.model.x.y"]), r"holds a tensor 'x\.y' that no adapter"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_with_a_folder_is_named(folder, what):
    breaks, message = BROKEN[what]
    breaks(folder)
    model = Holder(Encoder())
    with pytest.raises(CheckpointError, match=message):
        model.load_adapter(folder, module=model.net)


def test_another_method_or_shape_under_the_same_name_is_refused(folder):
    model = Holder(Encoder(), DoRA(rank=2))
    with pytest.raises(CheckpointError, match="holds a LoRA adapter, and 'default' is a DoRA here"):
        model.load_adapter(folder, module=model.net)
    model = Holder(Encoder(), LoRA(rank=3))
    with pytest.raises(CheckpointError, match=r"has the shape \[2, 6\], and this module's has \[3, 6\]"):
        model.load_adapter(folder, module=model.net)


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = Holder(Encoder(), LoRA(rank=2))
    with pytest.raises(MisconfigurationError, match="there is no adapter 'other': there are default"):
        model.save_adapter(tmp_path, name="other")
    model.merge_adapters()
    with pytest.raises(MisconfigurationError, match="adapters are merged"):
        model.save_adapter(tmp_path)
    with pytest.raises(MisconfigurationError, match="peft has no BitFit"):
        Holder(Encoder(), BitFit()).save_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", [LoRA(rank=2), DoRA(rank=2), IA3(targets=("query",)), BitFit()])
def test_the_merged_export_is_the_plain_module(policy, tmp_path):
    model, x = moved(Holder(Encoder(), policy)), torch.randn(4, 6)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.export_merged(tmp_path / "merged.safetensors", module=model.net)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    file = WeightsFile(tmp_path / "merged.safetensors")
    plain = Encoder(seed=3)
    plain.load_state_dict({name: file.tensor(name) for name in file.names}, strict=True)
    torch.testing.assert_close(plain(x), model.net(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(MisconfigurationError, match=r"must end in .safetensors"):
        model.export_merged(tmp_path / "merged.bin", module=model.net)


def test_after_a_fit(tmp_path):
    trainer().fit(model := Classifier())
    model.save_adapter(tmp_path)
    fresh = Classifier()
    fresh.load_adapter(tmp_path, module=fresh.encoder)
    assert torch.equal(fresh.encoder.layer[0].query.lora_B, model.encoder.layer[0].query.lora_B)
