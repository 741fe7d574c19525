"""Prompt tuning and prefix tuning against peft: outputs, gradients, files."""

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins import AdapterMixin, LoRA, PrefixTuning, PromptTuning
from tests.mixins.models import QUIET, trainer

transformers = pytest.importorskip("transformers")
pytestmark = QUIET


class Bare(AdapterMixin, L.LightningModule):
    def __init__(self, net, policy=None):
        super().__init__()
        self.net = net
        if policy is not None:
            self.adapt(self.net, policy)


def decoder(kind="gpt2"):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=40, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=40, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def encoder():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    return transformers.BertModel(config).eval()


IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def under_peft(base, kind, values, task="CAUSAL_LM"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

        config = (PromptTuningConfig if kind == "prompt" else PrefixTuningConfig)(
            task_type=task, num_virtual_tokens=values.shape[0]
        )
        theirs = get_peft_model(base, config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(values)
    return theirs


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_outputs_and_gradients_are_those_of_peft(kind, method, tmp_path):
    policy = PromptTuning(tokens=3) if method == "prompt" else PrefixTuning(tokens=3)
    model = Bare(decoder(kind), policy).eval()
    trained = model.net.prompts.prompt if method == "prompt" else model.net.prompts.prefix
    assert [p is trained for p in model.parameters() if p.requires_grad] == [True]
    nn.init.normal_(trained, std=0.5)
    theirs = under_peft(decoder(kind), method, trained.detach())
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    ours, expected = model.net(**inputs), theirs(**inputs)
    assert ours.logits.shape == (2, 6, 50)
    torch.testing.assert_close(ours.logits, expected.logits[:, -6:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(
        trained.grad, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-6
    )
    with model.adapters_disabled():
        torch.testing.assert_close(model.net(**inputs).logits, decoder(kind)(**inputs).logits)
    model.save_adapter(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(decoder(kind), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(**inputs).loss, ours.loss, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = Bare(decoder(kind)).eval()
    again.load_adapter(tmp_path / "theirs", module=again.net)
    torch.testing.assert_close(again.net(**inputs).logits, ours.logits, rtol=1e-5, atol=1e-5)


def test_an_encoder_gives_as_many_vectors_as_there_are_tokens():
    model = Bare(encoder(), PromptTuning(tokens=3)).eval()
    theirs = under_peft(encoder(), "prompt", model.net.prompts.prompt.detach(), "FEATURE_EXTRACTION")
    ours = model.net(input_ids=IDS, attention_mask=MASK).last_hidden_state
    expected = theirs(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(ours, expected[:, 3:], rtol=1e-5, atol=1e-5)
    table = model.net.get_input_embeddings().weight
    assert all(any(torch.equal(row, one) for one in table) for row in model.net.prompts.prompt)


def test_a_reparametrised_prefix_is_what_its_network_makes(tmp_path):
    model = Bare(decoder(), PrefixTuning(tokens=3, reparametrised=7)).eval()
    parts = dict(model.net.prompts.named_parameters())
    inner = torch.tanh(parts["prefix"] @ parts["prefix_in"].t() + parts["prefix_in_bias"])
    expected = inner @ parts["prefix_out"].t() + parts["prefix_out_bias"]
    torch.testing.assert_close(model.net.prompts(), expected)
    out = model.net(input_ids=IDS)
    out.logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in parts.values())
    model.save_adapter(tmp_path)
    again = Bare(decoder()).eval()
    again.load_adapter(tmp_path, module=again.net)
    torch.testing.assert_close(again.net(input_ids=IDS).logits, out.logits, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 16 + 7 * 17 + 64 * 8


class Fitted(Bare):
    def __init__(self):
        super().__init__(decoder().train(), PromptTuning(tokens=2))

    def training_step(self, batch, _):
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IDS.repeat(4, 1)), batch_size=4)


def test_trains_saves_and_resumes(tmp_path):
    trainer().fit(model := Fitted())
    before = decoder().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.net.named_parameters() if name in before)
    model.trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if "prompt" in name} == {"net.prompts.prompt"}
    loaded = Fitted.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.net.prompts.prompt, model.net.prompts.prompt)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.net.prompts.prompt)
    assert model.net.prompts.prompt.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuning(tokens=0), "`tokens` must be a whole number"),
        (lambda: PromptTuning(init="words"), "`init` must be vocabulary or random"),
        (lambda: PrefixTuning(reparametrised=-1), "`reparametrised` must be a width"),
        (lambda: Bare(nn.Linear(2, 2), PromptTuning()), "models of Hugging Face's, and Linear is none"),
        (lambda: Bare(encoder(), PrefixTuning()), "BertModel is none: use PromptTuning"),
        (lambda: Bare(decoder(), PromptTuning()).net(IDS), "takes keyword arguments only"),
        (lambda: Bare(decoder(), PromptTuning()).net(attention_mask=MASK), "given neither"),
        (
            lambda: Bare(decoder(), PromptTuning()).net(input_ids=IDS, return_dict=False),
            "leave out `return_dict=False`",
        ),
        (lambda: Bare(decoder(), PromptTuning()).merge_adapters(), "PromptTuning cannot be merged: it is no change"),
        (lambda: Bare(decoder(), PromptTuning()).use_adapters({"default": 0.5}), "cannot be weighted or combined"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(MisconfigurationError, match=message):
        make()


def test_beside_low_rank_adapters():
    model = Bare(decoder(), LoRA(rank=2, targets=("c_attn",)))
    model.adapt(model.net, PromptTuning(tokens=2), name="prompt")
    model.use_adapters({"default": 1.0, "prompt": 1.0})
    assert model.net(input_ids=IDS).logits.shape == (2, 6, 50)


def test_another_number_of_vectors_is_refused(tmp_path):
    model = Bare(decoder(), PromptTuning(tokens=3))
    model.save_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_virtual_tokens": 3', '"num_virtual_tokens": 4'))
    with pytest.raises(CheckpointError, match="holds 3 vectors, and the configuration says 4"):
        Bare(decoder()).load_adapter(tmp_path, module=nn.Identity())


# -- generation --------------------------------------------------------------------------------------------------------


def lively(kind):
    """A decoder whose next token depends on what came before: random weights of the usual size hardly do."""
    net = decoder(kind)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return net


def generated(net, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return net.generate(input_ids=ids, attention_mask=mask, **length, **options)[:, ids.shape[1] :]


def prompted(kind, method):
    """Ours and peft's, with a prompt that matters."""
    model = Bare(lively(kind), PromptTuning(tokens=3) if method == "prompt" else PrefixTuning(tokens=3)).eval()
    trained = model.net.prompts.prompt if method == "prompt" else model.net.prompts.prefix
    nn.init.normal_(trained, std=2.0)
    return model, under_peft(lively(kind), method, trained.detach())


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_generates_what_peft_generates(method, kind, options):
    model, theirs = prompted(kind, method)
    found = generated(model.net, IDS, **options)
    if method == "prefix" and "use_cache" in options:  # peft cannot: a prefix is a cache
        assert torch.equal(found, generated(model.net, IDS))
        return
    assert torch.equal(found, generated(theirs, IDS, **options))
    assert not torch.equal(found, generated(lively(kind), IDS, **options)), "the prompt does nothing"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_padded_row_generates_what_it_does_alone(method, kind):
    model, _ = prompted(kind, method)
    ids, mask = torch.cat((torch.zeros(1, 2, dtype=torch.long), IDS[:1, :4]), 1), torch.tensor([[0, 0, 1, 1, 1, 1]])
    together = generated(model.net, torch.cat((IDS[1:], ids)), torch.cat((torch.ones_like(mask), mask)))
    assert torch.equal(together[1:], generated(model.net, IDS[:1, :4]))
    assert torch.equal(together[:1], generated(model.net, IDS[1:]))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_steps_through_a_cache_of_the_users(method):
    model, _ = prompted("llama", method)
    cache = transformers.DynamicCache()
    first = model.net(input_ids=IDS[:1, :4], past_key_values=cache, use_cache=True)
    second = model.net(input_ids=IDS[:1, 4:], past_key_values=cache, use_cache=True)
    both = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(both, model.net(input_ids=IDS[:1]).logits, rtol=1e-5, atol=1e-5)
    places = torch.arange(6)[None]
    torch.testing.assert_close(model.net(input_ids=IDS[:1], position_ids=places).logits, both, rtol=1e-5, atol=1e-5)


def test_a_cache_of_fixed_size_is_refused():
    model, _ = prompted("llama", "prompt")
    with pytest.raises(MisconfigurationError, match="a StaticCache has no room for the prompt's positions"):
        generated(model.net, IDS, cache_implementation="static")
