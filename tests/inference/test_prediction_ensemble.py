"""Prediction ensembles: the mean of what the members predict, however they are loaded."""

import copy

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from lightning_tricks.engines import Stored
from lightning_tricks.errors import CheckpointError, DataError, MisconfigurationError
from lightning_tricks.inference import PredictionEnsemble
from lightning_tricks.inference._class_scores import CalibrationError
from lightning_tricks.mixins import LoRA, LoRAMixin

CLASSES, KINDS = 4, ("lazy", "stacked", "auto")


class Net(L.LightningModule):
    def __init__(self, labels=("a", "b", "c", "d"), fold=0):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
        )

    def forward(self, x):
        return self.layers(x)


class Adapted(LoRAMixin, Net):
    def __init__(self, labels=("a", "b", "c", "d"), fold=0, base=0):
        super().__init__(labels, fold)
        with torch.random.fork_rng():
            torch.manual_seed(base)
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        self.adapt(self.layers, LoRA(rank=2, targets=("0",)), trainable=("4",))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(50, 5, generator=generator), torch.randint(0, CLASSES, (50,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16)


@pytest.fixture
def trainer():
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 1}
    return L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **options)


def some(kind, seed, **options):
    module = kind(fold=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 + 0.1)
    return module.eval()


@pytest.fixture
def saved(trainer, tmp_path):
    def write(modules):
        for place, module in enumerate(modules):
            trainer.strategy.connect(module)
            trainer.save_checkpoint(tmp_path / f"{place}.ckpt")
        return [tmp_path / f"{place}.ckpt" for place in range(len(modules))]

    return write


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
@pytest.mark.parametrize("loading", KINDS)
@pytest.mark.parametrize("kind", [Net, Adapted])
def test_predicts_the_mean(trainer, saved, data, kind, loading, mean):
    members = [some(kind, seed) for seed in range(3)]
    ensemble = PredictionEnsemble(saved(members), kind, mean=mean, loading=loading)
    found = torch.cat(trainer.predict(ensemble, data))
    x = data.dataset.tensors[0]
    with torch.no_grad():
        logits = [member(x).double() for member in members]
    expected = (
        sum(each.softmax(-1) for each in logits) / 3 if mean == "probabilities" else (sum(logits) / 3).softmax(-1)
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("loading", ["lazy", "stacked"])
def test_members_of_another_dtype_are_computed_in_the_modules(saved, data, loading):
    members = [some(Net, seed).half() for seed in range(3)]
    ensemble = PredictionEnsemble(saved(members), Net(), loading=loading)
    x = data.dataset.tensors[0]
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            expected = sum(copy.deepcopy(member).to(dtype)(x.to(dtype)).softmax(-1) for member in members) / 3
        found = ensemble.to(dtype)(x.to(dtype))
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
        ensemble.bfloat16()(x.bfloat16())  # rounds nothing for good


def test_the_stack_does_not_stay_where_the_module_was(saved):
    ensemble = PredictionEnsemble(saved([some(Net, seed) for seed in range(2)]), Net(), loading="stacked")
    ensemble(torch.ones(3, 5))
    ensemble.to("meta")
    assert not ensemble._stack
    assert ensemble(torch.ones(3, 5, device="meta")).device.type == "meta"
    assert {tensor.device.type for tensor in ensemble._stack.values()} == {"meta"}


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_scores_what_it_predicts(trainer, saved, data, stage):
    members = [some(Net, seed) for seed in range(3)]
    ensemble = PredictionEnsemble(saved(members), Net())
    for _ in range(2):  # the second run starts over
        [found] = getattr(trainer, stage)(ensemble, data, verbose=False)
    x, y = data.dataset.tensors
    with torch.no_grad():
        p = sum(member(x).softmax(-1) for member in members) / 3
    area = "test" if stage == "test" else "val"
    assert found[f"{area}/accuracy"] == pytest.approx((p.argmax(-1) == y).float().mean().item())
    assert found[f"{area}/loss"] == pytest.approx(F.nll_loss(p.log(), y).item(), rel=1e-5)
    f1 = multiclass_f1_score(p, y, CLASSES, average="macro")
    assert found[f"{area}/macro_f1"] == pytest.approx(f1.item())
    assert found[f"{area}/calibration_error"] == pytest.approx(
        multiclass_calibration_error(p, y, CLASSES, n_bins=15, norm="l1").item(), abs=1e-6
    )


def test_dictionaries_are_scored(trainer, saved):
    class Named(Net):
        def forward(self, batch):
            return self.layers(batch["x"])

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"x": torch.ones(5) * index, "labels": index % CLASSES}

    ensemble = PredictionEnsemble(saved([some(Named, 1)]), Named)
    [found] = trainer.test(ensemble, DataLoader(Rows(), batch_size=4), verbose=False)
    assert 0 <= found["test/accuracy"] <= 1


def test_a_forward_of_ones_own(saved):
    member = some(Net, 1)
    ensemble = PredictionEnsemble(
        saved([member]), Net, forward=lambda module, batch: module(batch[1]), loading="stacked"
    )
    x = torch.randn(6, 5)
    torch.testing.assert_close(ensemble((None, x)), member(x).softmax(-1))


def test_lazy_holds_one_member(saved, data, monkeypatch):
    ensemble = PredictionEnsemble(saved([some(Net, seed) for seed in range(3)]), Net, loading="lazy")
    read, tensor = [], Stored.tensor
    monkeypatch.setattr(Stored, "tensor", lambda self, name: (read.append(self.path.stem), tensor(self, name))[1])
    first = ensemble(torch.ones(2, 5))
    names = len(Net().state_dict())
    assert [read[place] for place in range(0, len(read), names)] == ["1", "2"]
    assert torch.equal(ensemble(torch.ones(2, 5)), first)
    assert [read[place] for place in range(0, len(read), names)] == ["1", "2", "1", "0"]
    assert not ensemble._stack


def test_stacked_reads_once(saved, monkeypatch):
    ensemble = PredictionEnsemble(saved([some(Adapted, seed) for seed in range(3)]), Adapted, loading="stacked")
    ensemble(torch.ones(2, 5))
    monkeypatch.setattr(Stored, "tensor", None)
    ensemble(torch.ones(2, 5))
    assert "module.layers.0.weight" not in ensemble._stack  # frozen: the members share it
    assert ensemble._stack["module.layers.0.lora_A"].shape[0] == 3


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda: some(Net, 1, labels=("b", "a", "c", "d")), r"1\.ckpt.*`labels` is \('b', 'a', 'c', 'd'\)"),
        (lambda: some(Adapted, 1), r"1\.ckpt.*`layers\.0\.weight` is absent"),
    ],
)
def test_members_that_do_not_go_together_are_refused(saved, odd, message):
    with pytest.raises(CheckpointError, match=message):
        PredictionEnsemble(saved([some(Net, 0), odd()]), Net)


def test_adapters_of_another_base_are_refused(saved):
    paths = saved([some(Adapted, 0)])
    with pytest.raises(CheckpointError, match="not the tensor that this checkpoint was trained on"):
        PredictionEnsemble(paths, Adapted(base=1))


def test_another_module_is_refused(saved):
    class Other(L.LightningModule):
        def __init__(self, **options):
            super().__init__()
            self.other = nn.Linear(5, CLASSES)

    with pytest.raises(CheckpointError, match=r"0\.ckpt does not fit Other"):
        PredictionEnsemble(saved([some(Net, 0)]), Other)


def test_cannot_be_trained(trainer, saved, data):
    with pytest.raises(MisconfigurationException, match="training_step"):
        trainer.fit(PredictionEnsemble(saved([some(Net, 0)]), Net), data)


def test_what_cannot_be_stacked_says_so(saved):
    class Branches(Net):
        def forward(self, x):
            return super().forward(x) if super().forward(x).sum() > 0 else super().forward(-x)

    ensemble = PredictionEnsemble(saved([some(Branches, seed) for seed in range(2)]), Branches, loading="stacked")
    with pytest.raises(MisconfigurationError, match=r"Branches cannot be computed.*loading='lazy'"):
        ensemble(torch.ones(2, 5))


def test_batches_without_targets(trainer, saved):
    with pytest.raises(DataError, match="type Tensor says no targets"):
        trainer.test(PredictionEnsemble(saved([some(Net, 0)]), Net), DataLoader(torch.ones(4, 5)), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "median"}, "`mean`.*got 'median'"),
        ({"loading": "eager"}, "`loading`.*got 'eager'"),
        ({"members": []}, "empty"),
    ],
)
def test_bad_options(saved, options, message):
    with pytest.raises(MisconfigurationError, match=message):
        PredictionEnsemble(**{"members": saved([some(Net, 0)]), "module": Net, **options})


def test_calibration_error_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(300, CLASSES, generator=generator).mul(3).softmax(-1)
    y = torch.randint(0, CLASSES, (300,), generator=generator)
    ours = CalibrationError(bins=15)
    for part in range(3):
        ours.update(p[part::3], y[part::3])
    expected = multiclass_calibration_error(p, y, CLASSES, n_bins=15, norm="l1")
    torch.testing.assert_close(ours.compute(), expected, rtol=1e-5, atol=1e-6)
