"""Members that hold adapters alone: averaged as the products BA, or refused by name."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_tricks.errors import CheckpointError
from lightning_tricks.inference import average_checkpoints
from lightning_tricks.mixins import LoRA, LoRAMixin


class Adapted(LoRAMixin, L.LightningModule):
    def __init__(self, base=0, rank=2, alpha=6.0, **options):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(base)
        self.net = nn.ModuleDict({"query": nn.Linear(5, 4), "out": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 2)
        self.adapt(self.net, LoRA(rank=rank, alpha=alpha, targets=("query",), **options))

    def forward(self, x):
        return self.head(torch.tanh(self.net["out"](self.net["query"](x))))


def trained(seed, **options):
    module = Adapted(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture
def saved(tmp_path):
    def write(name, module):
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        return tmp_path / f"{name}.ckpt"

    return write


def test_the_products_are_averaged_not_the_factors(saved, tmp_path, read):
    members = [trained(seed) for seed in range(3)]
    paths = [saved(str(n), member) for n, member in enumerate(members)]
    assert "net.query.weight" not in read(paths[0])
    average_checkpoints(paths, tmp_path / "mean.ckpt", module=Adapted())
    layers = [member.net["query"] for member in members]
    products = [3.0 * layer.lora_B.double().t() @ layer.lora_A.double() for layer in layers]  # alpha / rank = 3
    expected = Adapted().net["query"].weight.double() + sum(products) / 3
    factors = sum(layer.lora_B.double().t() for layer in layers) @ sum(layer.lora_A.double() for layer in layers) / 3
    loaded = Adapted.load_from_checkpoint(tmp_path / "mean.ckpt", strict=True)
    torch.testing.assert_close(loaded.net["query"].weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - Adapted().net["query"].weight.double() - factors).abs().max() > 0.1
    x = torch.randn(7, 5)
    torch.testing.assert_close(
        loaded.net["query"](x), nn.functional.linear(x, expected.float(), loaded.net["query"].bias)
    )
    assert torch.equal(loaded.net["out"].weight, Adapted().net["out"].weight)


def test_one_member_computes_as_before(saved, tmp_path):
    member = trained(1)
    average_checkpoints([saved("one", member)], tmp_path / "merged.ckpt", module=Adapted())
    x = torch.randn(7, 5)
    merged = Adapted.load_from_checkpoint(tmp_path / "merged.ckpt")
    torch.testing.assert_close(merged(x), member(x), rtol=1e-5, atol=1e-5)


def test_the_module_is_not_changed(saved, tmp_path):
    module = Adapted()
    before = [parameter.clone() for parameter in module.parameters()]
    average_checkpoints([saved("one", trained(1))], tmp_path / "mean.ckpt", module=module)
    assert all(map(torch.equal, module.parameters(), before))


@pytest.mark.parametrize("options", [{"rslora": True}, {"init": "gaussian"}])
def test_other_scales_and_starts(saved, tmp_path, options):
    members = [trained(seed, **options) for seed in range(2)]
    paths = [saved(str(n), member) for n, member in enumerate(members)]
    average_checkpoints(paths, tmp_path / "mean.ckpt", module=Adapted(**options))
    weights = [member.net["query"].merged_values()["weight"] for member in members]
    loaded = Adapted.load_from_checkpoint(tmp_path / "mean.ckpt", strict=True)
    torch.testing.assert_close(loaded.net["query"].weight, sum(weights) / 2, rtol=1e-5, atol=1e-5)


def test_principal_parts_are_refused(saved, tmp_path):
    path = saved("pissa", trained(0, init="pissa"))
    with pytest.raises(CheckpointError, match=r"pissa\.ckpt holds (PiSSA|`net\.query\.lora_A_start`)"):
        average_checkpoints([path], tmp_path / "mean.ckpt", module=Adapted(init="pissa"))


def test_a_rank_of_its_own_for_each_is_refused(saved, tmp_path):
    paths = [saved("two", trained(0)), saved("three", trained(0, rank=3, alpha=9.0))]
    with pytest.raises(CheckpointError, match=r"three\.ckpt does not fit `module`: `net` was adapted with rank=3"):
        average_checkpoints(paths, tmp_path / "mean.ckpt", module=Adapted())


@pytest.mark.parametrize(
    ("member", "module", "message"),
    [
        ({}, None, r"holds adapters \(`net\.query\.lora_A`\).*mean of A and of B apart.*`module=`"),
        ({"base": 1}, Adapted, r"does not fit `module`: `net\.query\.weight` is not the tensor"),
        ({"alpha": 8.0}, Adapted, r"does not fit `module`: `net` was adapted with alpha=8.*here with alpha=6"),
        ({}, lambda: nn.Module(), r"`net\.query` in `module` is absent"),
    ],
)
def test_what_cannot_be_merged_is_refused(saved, tmp_path, member, module, message):
    path = saved("odd", trained(0, **member))
    with pytest.raises(CheckpointError, match=message) as raised:
        average_checkpoints([path], tmp_path / "mean.ckpt", module=module and module())
    assert "odd.ckpt" in str(raised.value)


@pytest.mark.parametrize("key", ["net.query.lora_A.default.weight", "net.query.lora_magnitude", "net.lora_embedding_A"])
def test_adapters_of_others_are_refused(save, tmp_path, key):
    path = save("peft", {key: torch.ones(2, 5)})
    with pytest.raises(CheckpointError, match=rf"peft\.ckpt.*`{key}`, which is not of a single plain LoRA adapter"):
        average_checkpoints([path], tmp_path / "mean.ckpt", module=Adapted())


class InFewBits(LoRAMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"query": nn.Linear(64, 8)})
        self.adapt(self.net, LoRA(rank=2, targets=("query",)), base="nf4")


def test_a_base_in_few_bits_is_refused_and_exported_members_are_averaged(saved, tmp_path):
    paths, exported, merged = [], [], []
    for seed in range(2):
        member = InFewBits()
        layer = member.net["query"]
        nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(seed))
        update = layer.adapters["default"].scale * layer.lora_B.double().t() @ layer.lora_A.double()
        merged.append(layer.weight.double() + update)
        paths.append(saved(f"packed {seed}", member))
        exported.append(tmp_path / f"whole {seed}.safetensors")
        member.export_merged(exported[-1], module=member.net)
    with pytest.raises(CheckpointError, match=r"packed 0\.ckpt.*`module` keeps in nf4.*`export_merged.*Prediction"):
        average_checkpoints(paths, tmp_path / "mean.ckpt", module=InFewBits())
    assert not (tmp_path / "mean.ckpt").exists()
    average_checkpoints(exported, tmp_path / "mean.ckpt")
    found = torch.load(tmp_path / "mean.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(found["query.weight"].double(), sum(merged) / 2, rtol=1e-5, atol=1e-5)
