"""`adapters merge` on files as Hugging Face writes them: tied weights, Conv1D beside Linear, folders of peft's own."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lightning_tricks.cli.adapters import adapters
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins import IA3, LoRA
from lightning_tricks.storage import WeightsFile, write_weights
from tests.mixins.models import Holder, moved

pytestmark = pytest.mark.filterwarnings("ignore:.*float.*")


def language_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(3)
        config = GPT2Config(
            vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config).eval()


def merge(folder):
    paths = [str(folder / name) for name in ("adapter", "base/model.safetensors", "out.safetensors")]
    return adapters(["merge", *paths])


def test_a_tied_language_model_as_hugging_face_saves_it(tmp_path):
    base, ids = language_model(), torch.randint(0, 50, (2, 5))
    base.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" not in WeightsFile(tmp_path / "base/model.safetensors").names
    model = moved(Holder(copy.deepcopy(base), LoRA(rank=2, targets=("c_attn", "c_proj")))).eval()
    model.save_adapter(tmp_path / "adapter")
    assert merge(tmp_path) == 0
    file = WeightsFile(tmp_path / "out.safetensors")
    base.load_state_dict({name: file.tensor(name) for name in file.names}, strict=False)
    torch.testing.assert_close(base(input_ids=ids).logits, model.net(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    other = language_model()
    with torch.no_grad():
        other.transformer.wte.weight.add_(1)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"`transformer\.wte\.weight` in .* is not the tensor"):
        merge(tmp_path)


def test_a_merge_into_one_of_two_tied_weights_is_refused(tmp_path):
    base = language_model()
    base.save_pretrained(tmp_path / "base")
    moved(Holder(base, LoRA(rank=2, targets=("wte",)))).save_adapter(tmp_path / "adapter")
    with pytest.raises(MisconfigurationError, match=r"`transformer\.wte\.weight` is `lm_head\.weight` too"):
        merge(tmp_path)


class Mixed(nn.Module):
    """Linear layers and Conv1Ds; the last of each is square."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.pytorch_utils import Conv1D
        self.wide, self.narrow = Conv1D(12, 6), nn.Linear(12, 6)
        self.turned, self.straight = Conv1D(6, 6), nn.Linear(6, 6)
        nn.init.normal_(self.wide.weight)
        nn.init.normal_(self.turned.weight)

    def forward(self, x):
        return self.straight(self.turned(torch.tanh(self.narrow(torch.tanh(self.wide(x))))))


POLICIES = {
    "LoRA": LoRA(rank=2, targets=("wide", "narrow", "turned", "straight")),
    "IA3": IA3(targets=("wide", "straight"), feedforward=("narrow", "turned")),
}


@pytest.mark.parametrize("method", POLICIES)
def test_each_layer_is_merged_the_way_its_weight_lies(method, tmp_path):
    base, x = Mixed(), torch.randn(4, 6)
    model = moved(Holder(copy.deepcopy(base), POLICIES[method]))
    model.save_adapter(tmp_path / "adapter")
    state = base.state_dict()
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    write_weights(tmp_path / "base/model.safetensors", layout, state.items())
    merge(tmp_path)
    file = WeightsFile(tmp_path / "out.safetensors")
    base.load_state_dict({name: file.tensor(name) for name in file.names}, strict=True)
    torch.testing.assert_close(base(x), model.net(x), rtol=1e-5, atol=1e-5)
    notes = tmp_path / "adapter/lightning_tricks.json"
    notes.write_text(json.dumps({"base": json.loads(notes.read_text())["base"]}))  # as peft leaves it: without them
    with pytest.raises(MisconfigurationError, match=r"is square, and .* does not say whether its weight is"):
        merge(tmp_path)


def test_a_file_of_other_sizes_is_refused_by_name(tmp_path):
    base = Mixed()
    Holder(copy.deepcopy(base), LoRA(rank=2, targets=("wide",))).save_adapter(tmp_path / "adapter")
    (tmp_path / "adapter/lightning_tricks.json").unlink()
    write_weights(
        tmp_path / "base/model.safetensors",
        {"wide.weight": (torch.float32, (7, 5))},
        [("wide.weight", torch.ones(7, 5))],
    )
    with pytest.raises(CheckpointError, match=r"`wide` has the shape \[7, 5\], .* for 12 outputs and 6 inputs"):
        merge(tmp_path)
