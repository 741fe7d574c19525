"""SequencePacker with a small Llama of transformers: each way of telling it where documents end, against each alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from lightning_tricks.data import SequencePacker
from lightning_tricks.errors import MisconfigurationError

LENGTHS = [5, 2, 7, 3, 3, 1, 6]
DOCUMENTS = [{"input_ids": torch.arange(10 * i + 1, 10 * i + 1 + n)} for i, n in enumerate(LENGTHS)]
WAYS = ["mask", "cu_seqlens", "position_ids"]


def llama(kernel="sdpa", use_cache=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=80, max_position_embeddings=16, initializer_range=0.5, use_cache=use_cache, **sizes)
    config._attn_implementation = kernel
    return LlamaForCausalLM(config).eval()


def batch_of(*way):
    packer = SequencePacker(8, **({"attention": way[0]} if way else {}))
    rows = packer.pack(DOCUMENTS, LENGTHS)
    return packer, packer([rows[index] for index in range(len(rows))])


def outputs(logits, batch):
    """By document, in their order: its logits in the packed batch."""
    starts = {int(batch["input_ids"][at]): at for at in map(tuple, (batch["position_ids"] == 0).nonzero().tolist())}
    places = [starts[int(document["input_ids"][0])] for document in DOCUMENTS]
    return [logits[row, first : first + n] for (row, first), n in zip(places, LENGTHS, strict=True)]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_are_those_of_each_document_alone(way, kernel):
    packer, batch = batch_of(way)
    packed, alone = llama(kernel), llama(kernel)
    packer.check_isolation(packed, batch)
    found = packed(**batch)
    found.loss.backward()
    losses = []
    for document, seen in zip(DOCUMENTS, outputs(found.logits, batch), strict=True):
        ids = document["input_ids"][None]
        logits = alone(ids).logits[0]
        assert torch.allclose(seen, logits, atol=1e-5)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))
    loss = sum(losses) / (sum(LENGTHS) - len(LENGTHS))
    loss.backward()
    assert torch.allclose(found.loss, loss, rtol=1e-5)
    for one, other in zip(packed.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_the_mask_hides_at_half_precision(cast, kernel):
    packer, batch = batch_of()
    for mask in (batch["attention_mask"], batch["attention_mask"].to(cast)):  # DeepSpeed casts what batches hold
        half = {**batch, "attention_mask": mask}
        packer.check_isolation(llama(kernel).to(cast), half)
        with torch.autocast("cpu", cast):
            packer.check_isolation(llama(kernel), half)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_default_needs_nothing_of_the_model_s_options(kernel):
    packer, batch = batch_of()
    packer.check_isolation(llama(kernel, use_cache=True), batch)


@pytest.mark.parametrize(("way", "remedy"), [("cu_seqlens", "without flash.*use_cache=False"), ("position_ids", "use")])
def test_with_a_cache_the_others_leak_and_are_found_out(way, remedy):
    packer, batch = batch_of(way)
    with pytest.raises(MisconfigurationError, match=rf"sees another document.*`attention='{way}'`; .*{remedy}.*'mask'"):
        packer.check_isolation(llama(use_cache=True), batch)


@pytest.mark.parametrize("way", ["cu_seqlens", "position_ids"])
def test_flash_attention_takes_the_positions_of_several_rows_for_packed_ones(way):
    _, batch = batch_of(way)
    assert _is_packed_sequence(batch["position_ids"], batch_size=len(batch["position_ids"]))
