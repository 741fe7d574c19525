"""SequenceLengthWarmup: lengths grow with real tokens, exactly, and survive a resume."""

import lightning as L
import pytest
import torch

from lightning_tricks.callbacks import SequenceLengthWarmup
from lightning_tricks.data import DynamicPaddingCollator, SequencePacker, TricksDataLoader
from lightning_tricks.errors import MisconfigurationError
from tests.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:You defined a `validation_st")
LENGTHS = [40, 33, 12, 40, 7, 40, 38, 21, 40, 40]


class Spy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch):
        text = batch["text"]
        self.seen.append((tuple(text["input_ids"].shape), int(text["attention_mask"].sum()), tuple(batch["y"].shape)))
        assert text["labels"].shape == text["input_ids"].shape
        return self.layer(text["input_ids"].float().mean()[None]).mean()

    def validation_step(self, batch):
        self.validated.append(batch["text"]["input_ids"].shape[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


def loader(**options):
    data = [{"text": {"input_ids": [1] * n, "labels": [2] * n}, "y": 1} for n in LENGTHS]
    collate = DynamicPaddingCollator()
    return TricksDataLoader(data, **{"batch_size": 2, "shuffle": False, "seed": 0, "collate_fn": collate, **options})


def fit(folder, warmup, module=None, resume=None, **options):
    module = module or Spy()
    quiet_trainer(folder, [warmup], max_epochs=2, **options).fit(module, loader(), loader(), ckpt_path=resume)
    return module


def expected(start, end, tokens, multiple):
    """The schedule, written down once more: shapes and real tokens of two epochs."""
    seen, found = 0, []
    for _ in range(2):
        for first in range(0, len(LENGTHS), 2):
            length = end
            if seen < tokens:
                length = max(start, int(start + (end - start) * (seen / tokens)) // multiple * multiple)
            pair = [min(length, n) for n in LENGTHS[first : first + 2]]
            found.append(((2, max(pair)), sum(pair), (2,)))
            seen += sum(pair)
    return found


@pytest.mark.parametrize("multiple", [1, 8])
def test_lengths_grow_with_real_tokens(tmp_path, multiple):
    warmup = SequenceLengthWarmup(4, 40, tokens=100, multiple=multiple)
    module = fit(tmp_path, warmup)
    assert module.seen == expected(4, 40, 100, multiple)
    assert module.seen[0][0] == (2, 4)
    assert module.seen[-1][0] == (2, 40)
    assert set(module.validated) >= {40}
    assert warmup.length == 40


def expected_by_filtering(start, end, tokens, multiple):
    """The same for filtering: of each pair those that fit, or the shorter one, cut."""
    seen, found = 0, []
    for _ in range(2):
        for first in range(0, len(LENGTHS), 2):
            length = end
            if seen < tokens:
                length = max(start, int(start + (end - start) * (seen / tokens)) // multiple * multiple)
            pair = LENGTHS[first : first + 2]
            kept = [n for n in pair if n <= length] or [min(*pair, length)]
            found.append(((len(kept), max(kept)), sum(kept), (len(kept),)))
            seen += sum(kept)
    return found


@pytest.mark.parametrize("multiple", [1, 8])
def test_longer_samples_are_left_out(tmp_path, multiple):
    warmup = SequenceLengthWarmup(4, 40, tokens=40, multiple=multiple, by="filtering")
    module = fit(tmp_path, warmup)
    wanted = expected_by_filtering(4, 40, 40, multiple)
    assert module.seen == wanted
    assert {shape[0] for shape, *_ in module.seen} == {1, 2}
    assert warmup.tokens_seen == sum(tokens for _, tokens, _ in wanted[: 1 + next_full(wanted, 40)])
    assert set(module.validated) >= {40}


def next_full(wanted, tokens):
    """The batch with which the warm-up is over."""
    total = 0
    for place, (_, real, _) in enumerate(wanted):
        total += real
        if total >= tokens:
            return place
    raise AssertionError("too few tokens")


def test_filtering_leaves_each_sample_with_what_is_its_own(tmp_path):
    """Left-padded, with lists, tensors of one dimension and a number beside them."""
    rows = torch.tensor([[0, 0, 7, 7], [1, 1, 1, 1], [0, 0, 0, 9]])
    mask = (rows > 0).long()
    batch = {
        "text": {"input_ids": rows, "attention_mask": mask},
        "y": torch.tensor([7, 1, 9]),
        "name": ["seven", "one", "nine"],
        "weights": torch.ones(2),
        "temperature": torch.tensor(3.0),
    }
    found, warmup = taken(tmp_path, batch, by="filtering")
    assert found["text"]["input_ids"].tolist() == [[0, 0, 7, 7], [0, 0, 0, 9]]
    assert found["y"].tolist() == [7, 9]
    assert found["name"] == ["seven", "nine"]
    assert found["weights"].tolist() == [1, 1]
    assert warmup.tokens_seen == 3


class Take(Spy):
    """Keeps the batches as they come."""

    def training_step(self, batch):
        self.seen.append(batch)
        return self.layer(torch.ones(1, 1)).mean()


def taken(tmp_path, batch, **options):
    """What a module gets of one batch, and the warm-up."""
    module, warmup = Take(), SequenceLengthWarmup(3, 40, tokens=1000, **options)
    data = TricksDataLoader([0], batch_size=1, shuffle=False, seed=0, collate_fn=lambda _: batch)
    quiet_trainer(tmp_path, [warmup], max_epochs=1, limit_val_batches=0).fit(module, data)
    return module.seen[0], warmup


@pytest.mark.parametrize("by", ["truncation", "filtering"])
def test_padding_at_the_left_is_what_goes(tmp_path, by):
    """By filtering, the shorter row is kept, and cut."""
    rows = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 6, 7, 8, 9]])
    batch, warmup = taken(tmp_path, {"input_ids": rows, "attention_mask": (rows > 0).long(), "y": rows + 1}, by=by)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [7, 8, 9]][-1 if by == "filtering" else 0 :]
    assert torch.equal(batch["y"], batch["input_ids"] + 1)
    assert batch["attention_mask"].all()
    assert warmup.tokens_seen == batch["input_ids"].numel()


def test_rows_of_padding_alone_have_no_side(tmp_path):
    rows = torch.tensor([[1, 2, 3, 4, 0], [0, 0, 0, 0, 0]])
    batch, warmup = taken(tmp_path, {"input_ids": rows, "attention_mask": (rows > 0).long()})
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 0]]
    assert warmup.tokens_seen == 3


@pytest.mark.parametrize(
    ("attention", "message"),
    [("mask", r"`attention_mask` of shape \(1, 8\), .* got \(1, 1, 8, 8\)"), ("cu_seqlens", "end at `cu_seq_lens_q`")],
)
def test_packed_rows_are_refused(tmp_path, attention, message):
    packer = SequencePacker(8, attention=attention)
    batch = packer([[{"input_ids": [1, 2, 3, 4, 5]}, {"input_ids": [6, 7]}]])
    with pytest.raises(MisconfigurationError, match=message):
        taken(tmp_path, batch)


def test_padding_at_both_sides_is_refused(tmp_path):
    rows = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])
    with pytest.raises(MisconfigurationError, match="padding before some sequences and behind others"):
        taken(tmp_path, {"input_ids": rows, "attention_mask": (rows > 0).long()})


def test_filtering_needs_a_mask(tmp_path):
    data = TricksDataLoader(
        [{"input_ids": [1, 2]}], batch_size=1, shuffle=False, seed=0, collate_fn=DynamicPaddingCollator(masks={})
    )
    run = quiet_trainer(tmp_path, [SequenceLengthWarmup(4, 40, tokens=9, by="filtering")], limit_val_batches=0)
    with pytest.raises(MisconfigurationError, match=r"`by='filtering'` goes by .* `attention_mask` says"):
        run.fit(Spy(), data)


@pytest.mark.parametrize("by", ["truncation", "filtering"])
def test_resumed_in_the_middle(tmp_path, by):
    whole = fit(tmp_path, SequenceLengthWarmup(4, 40, tokens=300, by=by)).seen

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "seven.ckpt")

    run = quiet_trainer(tmp_path, [Save(), SequenceLengthWarmup(4, 40, tokens=300, by=by)], max_epochs=2, max_steps=8)
    run.fit(Spy(), loader(), loader())
    warmup = SequenceLengthWarmup(4, 40, tokens=300, by=by)
    assert fit(tmp_path, warmup, resume=tmp_path / "seven.ckpt").seen == whole[7:]


def test_batches_that_cannot_be_cut(tmp_path):
    class Other(Spy):
        def training_step(self, batch):
            raise AssertionError("trained")

    plain = TricksDataLoader(torch.ones(4, 3), batch_size=2, shuffle=False, seed=0)
    for options, name, data in (({"key": "tokens"}, "tokens", loader()), ({}, "input_ids", plain)):
        warmup = SequenceLengthWarmup(4, 40, tokens=9, **options)
        run = quiet_trainer(tmp_path, [warmup], max_epochs=1, limit_val_batches=0)
        with pytest.raises(MisconfigurationError, match=f"dictionaries with `{name}` of shape"):
            run.fit(Other(), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, "`start` must be a whole number above 0, got 0"),
        ({"end": 4}, "`start=4` must be below `end=4`"),
        ({"tokens": 0}, "`tokens` must be"),
        ({"multiple": 1.5}, "`multiple` must be"),
        ({"by": "sorting"}, "`by` must be 'truncation' or 'filtering', got 'sorting'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        SequenceLengthWarmup(**{"start": 4, "end": 40, "tokens": 9, **options})
