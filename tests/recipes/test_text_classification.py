"""TextClassifier: what it trains, what it measures, what it saves, and how it resumes."""

import functools
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score, recall_score

from lightning_tricks.engines import engine_of
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.recipes import TextClassificationData, TextClassifier
from lightning_tricks.recipes._encoders import lora_targets
from lightning_tricks.recipes.text_classification import _rate
from tests.conformance.compare import differences
from tests.trainers import quiet_trainer

LABELS = ["calm", "keen", "rare"]
trainer = functools.partial(quiet_trainer, max_epochs=2)


def build(name, **options):
    torch.manual_seed(1)
    return TextClassifier(LABELS, **{"class_counts": [24, 16, 8], "name": name, **options})


def remarks(path, **options):
    options = {"text": "remark", "label": "mood", "batch_size": 8, **options}
    return TextClassificationData(str(path), **options)


def batch_of(data):
    data.prepare_data()
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def values(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def test_scores_are_those_of_scikit_learn(tiny_bert, tsv, tmp_path):
    model, data = build(tiny_bert), remarks(tsv)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    batches = list(data.test_dataloader())
    with torch.no_grad():
        logits = torch.cat([model.eval()(batch) for batch in batches])
    truth, guess = torch.cat([batch["labels"] for batch in batches]), logits.argmax(1)
    recalls = recall_score(truth, guess, average=None)
    expected = {
        "loss": torch.nn.functional.cross_entropy(logits, truth, model.class_weights).item(),
        "accuracy": accuracy_score(truth, guess),
        "macro_f1": f1_score(truth, guess, average="macro"),
        **{f"recall_{label}": recall for label, recall in zip(LABELS, recalls, strict=True)},
    }
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    assert found == pytest.approx({f"test/{name}": value for name, value in expected.items()}, abs=1e-6)


def test_scores_start_over_every_time(tiny_bert, tsv, tmp_path):
    model, data = build(tiny_bert), remarks(tsv)
    first, again = (trainer(tmp_path).validate(model, datamodule=data, verbose=False) for _ in range(2))
    assert first == again
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    assert run.validate(model, datamodule=data, verbose=False) == [
        {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    ]


def test_what_is_logged_in_training(tiny_bert, tsv, tmp_path):
    run = trainer(tmp_path)
    run.fit(build(tiny_bert), datamodule=remarks(tsv))
    shared = {"loss", "accuracy", "macro_f1", "recall_calm", "recall_keen", "recall_rare"}
    assert set(run.callback_metrics) == {"train/loss", *(f"val/{name}" for name in shared)}


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_tuning_trains_what_it_says(tiny_bert, tsv, tmp_path, tuning):
    model = build(tiny_bert, tuning=tuning)
    before = values(model)
    trainer(tmp_path).fit(model, datamodule=remarks(tsv))
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    head = {"classifier.weight", "classifier.bias"}
    encoder = {name for name in before if name.startswith("encoder.")}
    adapters = {name for name in encoder if "lora_" in name}
    assert len(adapters) == (8 if tuning == "lora" else 0)
    # A key's bias adds the same to all of a query's scores: it has no gradient but rounding.
    assert changed >= head | {"lora": adapters, "head": set(), "full": set()}[tuning]
    assert changed - head - adapters == (changed & encoder if tuning == "full" else set())
    assert (len(changed & encoder) > 20) == (tuning == "full")


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_every_trainable_parameter_gets_a_gradient(tiny_bert, tsv, tuning):
    model = build(tiny_bert, tuning=tuning)
    model.class_weighted_loss(model(batch := batch_of(remarks(tsv))), batch["labels"]).backward()
    assert [name for name, p in model.named_parameters() if (p.grad is not None) != p.requires_grad] == []


def test_a_frozen_encoder_computes_as_in_evaluation(tiny_bert, tsv, tmp_path):
    modes = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            modes.append((module.encoder.training, module.dropout.training))

    trainer(tmp_path, [Watch()]).fit(build(tiny_bert, tuning="head"), datamodule=remarks(tsv))
    assert set(modes) == {(False, True)}
    modes.clear()
    trainer(tmp_path, [Watch()]).fit(build(tiny_bert), datamodule=remarks(tsv))
    assert set(modes) == {(True, True)}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_nothing(tiny_bert, tsv, pooling):
    model = build(tiny_bert, pooling=pooling).eval()
    batch = batch_of(remarks(tsv))
    alone = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        one = ids[: mask.sum()][None]
        alone.append(model({"input_ids": one, "attention_mask": torch.ones_like(one)}))
    torch.testing.assert_close(model(batch), torch.cat(alone))


def test_adapters_change_nothing_before_training(tiny_bert, tsv):
    batch = batch_of(remarks(tsv))
    with torch.no_grad():
        assert torch.equal(build(tiny_bert).eval()(batch), build(tiny_bert, tuning="full").eval()(batch))


def test_class_weights_come_from_the_training_counts(tiny_bert):
    assert build(tiny_bert).class_weights.tolist() == pytest.approx([48 / (3 * n) for n in (24, 16, 8)])
    assert build(tiny_bert, class_weighting="none").class_weights.tolist() == [1, 1, 1]
    assert TextClassifier(LABELS, name=tiny_bert, class_weighting="none").class_weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("tuning", ["lora", "head", "full"])
def test_checkpoint_loads_strictly_and_predicts_the_same(tiny_bert, tsv, tmp_path, tuning):
    model, data = build(tiny_bert, tuning=tuning), remarks(tsv)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.labels == LABELS
    (found,), (expected,) = ([torch.cat(trainer(tmp_path).predict(one, datamodule=data))] for one in (loaded, model))
    assert torch.equal(found, expected)
    assert found.shape == (60, 3)
    torch.testing.assert_close(found.sum(1), torch.ones(60))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not frozen & set(saved) or tuning == "head"


def test_adapters_of_another_encoder_are_refused(tiny_bert, tmp_path, tsv):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(build(tiny_bert), datamodule=remarks(tsv))
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = transformers.AutoModel.from_pretrained(tiny_bert)
    torch.nn.init.normal_(other.embeddings.word_embeddings.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"encoder.embeddings.word_embeddings.weight"):
        TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt", name=str(tmp_path / "other"))


class Saver(L.Callback):
    def __init__(self, folder, step):
        self.path, self.step = folder / "stopped.ckpt", step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class CountsSteps(TextClassifier):
    """Asks for the number of steps so early that Lightning itself does not restore the loader's position."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()


@pytest.mark.parametrize("make", [TextClassifier, CountsSteps])
@pytest.mark.parametrize("step", [4, 6, 9])
def test_resumed_equals_uninterrupted_dropout_included(tiny_bert, tsv, tmp_path, step, make, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    options = {"class_counts": [24, 16, 8], "name": tiny_bert}
    whole, saver = make(LABELS, **options), Saver(tmp_path, step)
    trainer(tmp_path, [saver]).fit(whole, datamodule=remarks(tsv))
    torch.manual_seed(99)
    resumed = make(LABELS, **options)
    trainer(tmp_path).fit(resumed, datamodule=remarks(tsv), ckpt_path=saver.path)
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(whole).items())


def test_dropout_differs_from_step_to_step(tiny_bert, tsv, tmp_path):
    model = build(tiny_bert)
    model.trainer = trainer(tmp_path)
    drawn = []
    for place in range(4):
        model.on_train_batch_start({}, place)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4
    model.on_train_batch_start({}, 2)
    assert torch.rand(1).item() == drawn[2]


def test_learning_rate_rises_then_falls_to_nothing(tiny_bert, tsv, tmp_path):
    rates = np.array([_rate(step, 100) for step in range(101)])
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert (rates[0], rates[10], rates[100]) == (0.1, 1, 0)
    assert _rate(10**6, float("inf")) == 1
    assert (_rate(0, 1), _rate(1, 1)) == (0.1, 0)
    run = trainer(tmp_path)
    run.fit(build(tiny_bert), datamodule=remarks(tsv))
    assert run.optimizers[0].param_groups[0]["lr"] == 0
    assert run.global_step == 12


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (transformers.RobertaConfig(hidden_size=16, num_attention_heads=2, intermediate_size=8), ("query", "value")),
        (transformers.DistilBertConfig(dim=16, n_heads=2, hidden_dim=8), ("q_lin", "v_lin")),
        (transformers.MPNetConfig(hidden_size=16, num_attention_heads=2, intermediate_size=8), ("q", "v")),
        (
            transformers.LlamaConfig(
                hidden_size=16, num_attention_heads=2, intermediate_size=8, num_hidden_layers=2, vocab_size=50
            ),
            ("q_proj", "v_proj"),
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_encoders_of_other_architectures(tmp_path, config, targets):
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    model = build(str(tmp_path))
    assert lora_targets(model.encoder) == targets
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 1]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    model.class_weighted_loss(model(batch), torch.tensor([0, 2])).backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any(targets[0] in name for name in trained)
    assert all("lora_" in name or name.startswith("classifier") for name in trained)


def test_encoders_that_cannot_be_used(tmp_path):
    gpt2 = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=50)
    transformers.AutoModel.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MisconfigurationError, match="target 'query' selects no layer of GPT2Model"):
        build(str(tmp_path / "gpt2"))
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2, vocab_size=50)
    transformers.AutoModel.from_config(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(MisconfigurationError, match="is an encoder with a decoder"):
        build(str(tmp_path / "t5"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MisconfigurationError, match="is no folder with a model"):
        build(str(tmp_path / "empty"))
    with pytest.raises(MisconfigurationError, match="`name=no/such` is no local folder, nor can it be fetched"):
        build("no/such")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["one"]}, "`labels` must be two or more distinct names, got .'one'"),
        ({"labels": ["a", "a"]}, "two or more distinct"),
        ({"tuning": "lara"}, "`tuning` must be one of lora, head, full, got 'lara'"),
        ({"pooling": "max"}, "`pooling` must be one of mean, cls, got 'max'"),
        ({"class_weighting": "inverse"}, "`class_weighting` must be one of balanced, none"),
        ({"lr": 0.0}, "`lr` must be above 0 and below 1, got 0.0"),
        ({"lr": float("nan")}, "got nan"),
        ({"rank": 0}, "`rank` must be a whole number of 1 or more, got 0"),
        ({"class_counts": None}, "`class_weighting='balanced'` needs `class_counts`"),
        ({"class_counts": [1, 2]}, "`class_counts` has 2 entries for 3 labels"),
    ],
)
def test_bad_options(tiny_bert, options, message):
    with pytest.raises(MisconfigurationError, match=message):
        TextClassifier(**{"labels": LABELS, "class_counts": [3, 2, 1], "name": tiny_bert, **options})


def test_the_packaged_encoder_learns_real_reviews(tmp_path):
    data = TextClassificationData(limit=100, max_length=24, batch_size=8)
    torch.manual_seed(0)
    model = TextClassifier(data.labels, class_counts=data.class_counts, lr=5e-3)
    run = trainer(tmp_path, max_epochs=3)
    run.fit(model, datamodule=data)
    learned = run.validate(model, data.train_dataloader(), verbose=False)[0]
    assert learned["val/macro_f1"] > 0.6  # a guess scores a third at best
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < 2_000_000


def trained(strategy, devices, encoder, path, out):
    """Scores, and weights after 20 steps, of a run of each tuning, from processes of its own."""
    command = [sys.executable, __file__, strategy, str(devices), encoder, str(path), str(out)]
    subprocess.run(command, check=True, timeout=250, capture_output=True)
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(900)  # six launches, three of them importing DeepSpeed
def test_every_strategy_trains_as_one_device_does(tiny_bert, tsv, tmp_path):
    alone = trained("auto", 1, tiny_bert, tsv, tmp_path / "auto.pt")
    assert len(alone["scores"]) == 3 * 13
    for strategy in ("ddp", "fsdp2", "zero_1", "zero_2", "zero_3"):
        found = trained(strategy, 2, tiny_bert, tsv, tmp_path / f"{strategy}.pt")
        assert found["scores"] == pytest.approx(alone["scores"], abs=1e-5), strategy
        assert list(differences(found["weights"], alone["weights"], 2e-5)) == [], strategy


def train(strategy, devices, encoder, path, out):
    scores, weights = {}, {}
    for tuning in ("lora", "head", "full"):
        model, data = build(encoder, tuning=tuning), remarks(path, batch_size=8 // int(devices))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run = trainer(Path(out).parent, strategy=strategy, devices=int(devices), max_steps=20, max_epochs=-1)
        run.fit(model, datamodule=data)
        found = {name: value.item() for name, value in run.callback_metrics.items()}
        # A key's bias has no gradient but rounding, which Adam makes as large as any other.
        whole = {name: value.clone() for name, value in engine_of(run).named_full_weights() if "key.bias" not in name}
        found |= run.test(model, datamodule=data, verbose=False)[0]
        scores |= {f"{tuning} {name}": value for name, value in found.items()}
        weights |= {f"{tuning} {name}": value for name, value in whole.items()}
    if run.is_global_zero:
        torch.save({"scores": scores, "weights": weights}, out)


if __name__ == "__main__":
    import lightning_tricks  # noqa: F401  (registers the flags)
    from tests.rank_process import leave

    train(*sys.argv[1:])
    leave()
