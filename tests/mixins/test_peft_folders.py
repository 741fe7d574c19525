"""Folders that peft writes by its own defaults, and options of its that change what the tensors mean."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins import IA3, LoRA
from lightning_tricks.mixins._adapter_folder import AdapterFolder
from lightning_tricks.mixins._peft_options import require_known_options
from tests.layers.test_resolved_targets import LLAMA, small
from tests.mixins.models import Encoder, Holder

pytestmark = pytest.mark.filterwarnings("ignore:.*float.*")

ADAPTERS = {
    "LoRA": (LoRA(rank=2), "LORA"),
    "IA3": (IA3(targets=("query", "value")), "IA3"),
}


def written(base, folder, **options):
    """By peft, with its own way to save."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, **options)).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.save_pretrained(str(folder))
    return theirs


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_peft_writes_along_are_recognised(tied, tmp_path):
    options, ids = LLAMA | {"tie_word_embeddings": tied}, torch.randint(0, 30, (2, 5))
    base = small("Llama", "ForCausalLM", **options).eval()
    targets = ["embed_tokens", "q_proj"] + ([] if tied else ["lm_head"])
    theirs = written(base, tmp_path, target_modules=targets)
    model = Holder(copy.deepcopy(base)).eval()
    model.load_adapter(tmp_path, module=model.net)
    torch.testing.assert_close(model.net(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not model.net.model.embed_tokens.weight.requires_grad
    other = Holder(small("Llama", "ForCausalLM", **options))
    with pytest.raises(
        CheckpointError, match=r"holds `(model\.embed_tokens|lm_head)\.base_layer\.weight` of the base that it was"
    ):
        other.load_adapter(tmp_path, module=other.net)
    assert not other.adapter_names
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("arrow_config", {"top_k": 3}),
        ("alora_invocation_tokens", [1, 2]),
        ("ensure_weight_tying", True),
        ("kasa_config", {"beta": 1}),
        ("of_a_later_peft", "something"),
        ("bias", "all"),
    ],
)
def test_options_that_are_set_and_unknown_are_named(method, option, value, tmp_path):
    Holder(Encoder(), ADAPTERS[method][0]).save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for harmless in (None, False, [], {}):
        path.write_text(json.dumps({**config, option: harmless}))
        (model := Holder(Encoder())).load_adapter(tmp_path, module=model.net)
    path.write_text(json.dumps({**config, option: value}))
    model = Holder(Encoder())
    with pytest.raises(CheckpointError, match=rf"was made with {option}=.*, which has no counterpart"):
        model.load_adapter(tmp_path, module=model.net)
    assert not model.adapter_names


def test_pefts_own_defaults_are_all_known():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        for kind in ("Lora", "IA3", "PromptTuning", "PrefixTuning"):
            config = getattr(peft, f"{kind}Config")()
            plain = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
            require_known_options(AdapterFolder(plain, {}))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped, self.table = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Embedding(5, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["conv"], "use_dora": True}, "DoRA is for linear layers, and `conv` is a Conv2d"),
        ({"target_modules": ["table"], "use_dora": True}, "DoRA is for linear layers, and `table` is a Embedding"),
        ({"target_modules": ["grouped"]}, "`grouped` is a convolution in 2 groups"),
    ],
)
def test_what_peft_has_and_we_have_not_is_refused_by_name(options, message, tmp_path):
    base = Convolution()
    written(base, tmp_path, **options)
    model = Holder(base)
    with pytest.raises(MisconfigurationError, match=message):
        model.load_adapter(tmp_path, module=model.net)
    assert all(p.requires_grad for p in model.parameters())
