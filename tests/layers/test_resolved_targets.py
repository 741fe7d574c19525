"""What `"all-linear"` comes to for Hugging Face's models, beside peft, and which parts letters can name."""

import warnings

import pytest
from torch import nn

from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import find_targets
from lightning_tricks.mixins import LoRA
from tests.mixins.models import Holder

pytestmark = pytest.mark.filterwarnings("ignore:.*float.*")


def small(kind, head, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, kind + head)(config)


BERT = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
DISTIL = {"vocab_size": 30, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}
GPT2 = {"vocab_size": 30, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
LLAMA = {**BERT, "num_key_value_heads": 1, "tie_word_embeddings": True}
T5 = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
MODELS = {
    "BERT, classes": ("Bert", "ForSequenceClassification", BERT),
    "BERT, words": ("Bert", "ForMaskedLM", BERT),
    "DistilBERT, classes": ("DistilBert", "ForSequenceClassification", DISTIL),
    "GPT-2, classes": ("GPT2", "ForSequenceClassification", GPT2),
    "GPT-2, words": ("GPT2", "LMHeadModel", GPT2),
    "LLaMA, classes": ("Llama", "ForSequenceClassification", LLAMA),
    "LLaMA, words": ("Llama", "ForCausalLM", LLAMA),
    "T5, words": ("T5", "ForConditionalGeneration", T5),
}


@pytest.mark.parametrize("which", MODELS)
def test_all_linear_is_what_it_is_for_peft(which):
    kind, head, options = MODELS[which]
    model = small(kind, head, **options)
    found = set(find_targets(model, ["all-linear"]))
    inside = nn.Module()
    inside.net = model
    assert {name.removeprefix("net.") for name in find_targets(inside, ["all-linear"])} == found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, TaskType, inject_adapter_in_model

        task = TaskType.SEQ_CLS if "classes" in which else None
        theirs = inject_adapter_in_model(LoraConfig(target_modules="all-linear", r=2, task_type=task), model)
    assert found == {name for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert not any(name.rpartition(".")[2] in ("classifier", "score", "lm_head") for name in found)


@pytest.mark.parametrize("targets", ["all-linear", ("*",), ("classifier",)])
def test_a_new_head_that_is_frozen_is_warned_of_even_if_it_is_adapted(targets):
    with pytest.warns(UserWarning, match="`classifier` is inside the adapted module and frozen"):
        Holder(small("Bert", "ForSequenceClassification", num_labels=4, **BERT), LoRA(rank=2, targets=targets))


INTERLEAVED = {
    "Bloom": ("Bloom", "Model", {"vocab_size": 30, "hidden_size": 8, "n_layer": 1, "n_head": 2}),
    "GPT-NeoX": ("GPTNeoX", "Model", BERT),
    "CodeGen": ("CodeGen", "Model", {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),
}


@pytest.mark.parametrize("which", INTERLEAVED)
def test_letters_do_not_name_parts_that_lie_head_by_head(which):
    kind, head, options = INTERLEAVED[which]
    model, name = small(kind, head, **options), "qkv_proj" if which == "CodeGen" else "query_key_value"
    with pytest.raises(
        MisconfigurationError, match=f"{name}` is of a .*Attention, which keeps q, k and v of each head"
    ):
        find_targets(model, [f"{name}:q,v"])
    (target,) = find_targets(model, [f"{name}:0-4"]).values()
    assert target.slices == ((0, 4),)


def test_letters_need_three_equal_parts():
    phi = small("Phi3", "Model", **BERT, num_key_value_heads=1, pad_token_id=0)
    with pytest.raises(MisconfigurationError, match=r"Phi3Attention with 2 heads of q and 1 of k and v"):
        find_targets(phi, ["qkv_proj:q"])
    for outputs in (12, 9):
        net = nn.ModuleDict({"qkv": nn.Linear(6, outputs)})
        with pytest.raises(
            MisconfigurationError, match=rf"`qkv` has {outputs} outputs and 6 inputs, so that q, k and v"
        ):
            find_targets(net, ["qkv:q,v"])
