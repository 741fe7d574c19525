"""SequencePacker: whole documents in full rows, none of which sees another."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_tricks.data import SequencePacker, TricksDataLoader
from lightning_tricks.errors import DataError, MisconfigurationError

LENGTHS = [5, 2, 7, 3, 3, 1, 6]
DOCUMENTS = [{"input_ids": torch.arange(10 * i + 1, 10 * i + 1 + n)} for i, n in enumerate(LENGTHS)]


class Attention(nn.Module):
    """One layer of causal attention over embeddings with positions."""

    def __init__(self, follows=("attention_mask", "cu_seq_lens_q")):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(80, 8), nn.Embedding(16, 8)
        self.out = nn.Linear(8, 5)
        self.follows = follows

    def forward(self, input_ids, position_ids, **told):
        x = self.tokens(input_ids) + self.positions(position_ids)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if "attention_mask" in told and "attention_mask" in self.follows:
            mask = told["attention_mask"][:, 0]
        if "cu_seq_lens_q" in told and "cu_seq_lens_q" in self.follows:
            ends = told["cu_seq_lens_q"]
            mask = torch.block_diag(*[torch.ones(int(n), int(n)).tril() for n in ends.diff()]).bool()
        return self.out(F.scaled_dot_product_attention(x, x, x, attn_mask=mask))


def batch_of(attention, **options):
    packer = SequencePacker(8, attention=attention, **options)
    rows = packer.pack(DOCUMENTS, LENGTHS)
    return packer, packer([rows[index] for index in range(len(rows))])


def test_every_document_comes_once_and_whole():
    packer = SequencePacker(8)
    rows = packer.pack(DOCUMENTS, LENGTHS)
    found = sorted(document["input_ids"].tolist() for index in range(len(rows)) for document in rows[index])
    assert found == sorted(document["input_ids"].tolist() for document in DOCUMENTS)
    assert len(rows) == 4  # of 27 tokens
    loader = TricksDataLoader(rows, batch_size=2, shuffle=True, seed=0, collate_fn=packer)
    assert sorted(n for batch in loader for n in batch["input_ids"].flatten().tolist() if n) == sorted(
        n for document in found for n in document
    )


@pytest.mark.parametrize("attention", ["mask", "cu_seqlens"])
def test_outputs_are_those_of_the_documents_alone(attention):
    packer, batch = batch_of(attention)
    model = Attention()
    packer.check_isolation(model, batch)
    packed = model(**{key: value for key, value in batch.items() if key != "labels"})
    starts = (batch["position_ids"] == 0).nonzero().tolist()
    seen = 0
    for row, start in starts:
        first = int(batch["input_ids"][row, start])
        for document in DOCUMENTS:
            ids = document["input_ids"]
            if int(ids[0]) == first:
                alone = model(ids[None], torch.arange(len(ids))[None])
                assert torch.allclose(packed[row, start : start + len(ids)], alone[0], atol=1e-6)
                seen += 1
    assert seen == len(DOCUMENTS)


def test_the_fingerprint_is_of_the_documents_and_of_their_places():
    class Known(list):
        def fingerprint(self):
            return "7 documents"

    def loader(documents, capacity=8, lengths=LENGTHS):
        rows = SequencePacker(capacity).pack(documents, lengths)
        return TricksDataLoader(rows, batch_size=1, shuffle=False, seed=0, collate_fn=SequencePacker(capacity))

    one = loader(DOCUMENTS)
    next(iter(one))
    loader(DOCUMENTS).load_state_dict(one.state_dict())
    other = [5, 2, 7, 3, 1, 3, 6]  # as many rows
    assert len(loader(DOCUMENTS, lengths=other)) == len(one)
    for changed in (loader(DOCUMENTS, lengths=other), loader(Known(DOCUMENTS))):
        with pytest.raises(MisconfigurationError, match=r"with fingerprint of the data=.*, but now fingerprint"):
            changed.load_state_dict(one.state_dict())


@pytest.mark.parametrize("attention", ["mask", "cu_seqlens", "position_ids"])
def test_a_model_that_does_not_follow_is_found_out(attention):
    packer, batch = batch_of(attention)
    with pytest.raises(MisconfigurationError, match=rf"sees another document.*`attention='{attention}'`"):
        packer.check_isolation(Attention(follows=()), batch)


def test_no_target_is_predicted_from_another_document():
    _, batch = batch_of("position_ids")
    assert batch["input_ids"].shape == (1, 4 * 8)
    first = batch["position_ids"] == 0
    assert (batch["labels"][first] == -100).all()
    real = (batch["input_ids"] > 0) & ~first
    assert torch.equal(batch["labels"][real], batch["input_ids"][real])
    assert (batch["labels"][batch["input_ids"] == 0] == -100).all()


def test_labels_of_tokens_and_both_directions():
    documents = [{**document, "labels": document["input_ids"] + 100} for document in DOCUMENTS]
    packer = SequencePacker(8, attention="mask", causal=False)
    rows = packer.pack(documents, LENGTHS)
    batch = packer([rows[0], rows[1]])
    real = batch["input_ids"] > 0
    assert torch.equal(batch["labels"][real], batch["input_ids"][real] + 100)
    assert torch.equal(batch["attention_mask"], batch["attention_mask"].transpose(-1, -2))
    assert batch["attention_mask"].shape == (2, 1, 8, 8)
    assert "labels" not in SequencePacker(8, causal=False)([[DOCUMENTS[0]]])


def test_bad_input():
    with pytest.raises(DataError, match="Sample 2 has length 7, more than `capacity=6`"):
        SequencePacker(6).pack(DOCUMENTS, LENGTHS)
    with pytest.raises(DataError, match="There are 6 lengths, but 7 samples"):
        SequencePacker(8).pack(DOCUMENTS, LENGTHS[:-1])
    with pytest.raises(DataError, match="A row holds 4 tokens more than `capacity=8`: measure"):
        SequencePacker(8)([[DOCUMENTS[0], DOCUMENTS[2]]])
    with pytest.raises(MisconfigurationError, match="`attention` must be one of mask, cu_seqlens, position_ids"):
        SequencePacker(8, attention="flash")
    with pytest.raises(MisconfigurationError, match="`capacity` must be"):
        SequencePacker(0)
