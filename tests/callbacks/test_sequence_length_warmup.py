"""SequenceLengthWarmup: lengths grow with real tokens, exactly, and survive a resume."""

import lightning as L
import pytest
import torch

from lightning_tricks.callbacks import SequenceLengthWarmup
from lightning_tricks.data import DynamicPaddingCollator, TricksDataLoader
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


def test_resumed_in_the_middle(tmp_path):
    whole = fit(tmp_path, SequenceLengthWarmup(4, 40, tokens=300)).seen

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "seven.ckpt")

    run = quiet_trainer(tmp_path, [Save(), SequenceLengthWarmup(4, 40, tokens=300)], max_epochs=2, max_steps=8)
    run.fit(Spy(), loader(), loader())
    assert fit(tmp_path, SequenceLengthWarmup(4, 40, tokens=300), resume=tmp_path / "seven.ckpt").seen == whole[7:]


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
    ],
)
def test_bad_options(options, message):
    with pytest.raises(MisconfigurationError, match=message):
        SequenceLengthWarmup(**{"start": 4, "end": 40, "tokens": 9, **options})
