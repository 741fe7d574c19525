"""What processes do together in test_adapter_file_engines.py: save, export, and load again on one device."""

import contextlib
from pathlib import Path

import lightning as L
import torch

from lightning_tricks.engines import engine_of, ranks, whole
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins import PrefixTuning, PromptTuning
from lightning_tricks.storage import WeightsFile
from tests.conformance.adapter_cases import BASES, METHODS, Adapted, Decoder
from tests.conformance.model import Classifier, loader
from tests.mixins.models import Classifier as Plain
from tests.mixins.models import Holder, trainer


def tokens() -> torch.Tensor:
    return torch.randint(1, 20, (4, 7), generator=torch.Generator().manual_seed(0))


def adapted_part(module: L.LightningModule) -> torch.nn.Module:
    return module.encoder.net if isinstance(module.encoder, Decoder) else module.encoder


def plain(method: str) -> L.LightningModule:
    """The base before it was adapted, whose encoder computes what it computes."""
    L.seed_everything(0, verbose=False)
    module = Classifier()
    if isinstance(METHODS[method], PromptTuning | PrefixTuning):
        module.encoder = Decoder()
    return module


def fitted(method: str, strategy: str, precision: str) -> Adapted:
    L.seed_everything(0, verbose=False)
    module, world = Adapted(method), ranks()[1] if strategy == "auto" else 2
    ours = trainer(strategy=strategy, devices=world, precision=precision, max_steps=2, use_distributed_sampler=False)
    ours.fit(module, loader(16, seed=1, world=world))
    return module


def save_and_reload(strategy: str, precision: str, folder: str, method: str) -> dict[str, float | str]:
    """Train, save, export. Rank 0 loads each file into a fresh base: how far are outputs from the checkpoint's?"""
    module = fitted(method, strategy, precision)
    weights = {name: tensor.clone() for name, tensor in engine_of(module.trainer).named_full_weights()}
    saved, merged = Path(folder) / "adapter", Path(folder) / "merged.safetensors"
    answer = {"adapter": "", "merged": ""}
    try:
        module.save_adapter(saved)
    except MisconfigurationError as error:
        answer["adapter"] = str(error)
    try:
        module.export_merged(merged, module=adapted_part(module))
    except MisconfigurationError as error:
        answer["merged"] = str(error)
    if ranks()[0] == 0:
        with torch.random.fork_rng(), torch.inference_mode():
            answer |= compare(method, weights, saved, merged, answer)
    return answer


def compare(method: str, weights: dict, saved: Path, merged: Path, answer: dict) -> dict[str, float]:
    """The largest difference to what the checkpoint's entries compute, and theirs to the base alone."""
    L.seed_everything(0, verbose=False)
    reference = Adapted(method).eval()
    reference.load_state_dict(weights)
    expected, found = reference.encoder(tokens()), {}
    found["trained"] = distance(plain(method).eval().encoder(tokens()), expected)
    if not answer["adapter"]:
        base = plain(method).eval()
        holder = Holder(adapted_part(base))
        holder.load_adapter(saved, module=holder.net, base=BASES.get(method))
        base.eval()
        found["adapter"] = distance(base.encoder(tokens()), expected)
    if not answer["merged"]:
        base, file = plain(method).eval(), WeightsFile(merged)
        adapted_part(base).load_state_dict({name: file.tensor(name) for name in file.names})
        found["merged"] = distance(base.encoder(tokens()), expected)
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def fail_to_save(strategy: str, folder: str) -> list[str]:
    """What each rank is told when rank 0 cannot write."""
    module = fitted("LoRA", strategy, "32-true")
    blocked = Path(folder) / "a file"
    if ranks()[0] == 0:
        blocked.write_text("in the way")
    engine_of(module.trainer).barrier()
    told = []
    for write in (
        lambda: module.save_adapter(blocked / "adapter"),
        lambda: module.export_merged(blocked / "merged.safetensors", module=module.encoder),
    ):
        with contextlib.suppress(MisconfigurationError):  # what is sharded is not merged
            try:
                write()
                told.append("none")
            except CheckpointError as error:
                told.append(str(error))
    return told


class Extended(Plain):
    """It has something more than its checkpoint."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict_loading = strict
        torch.manual_seed(5)
        self.extra = torch.nn.Linear(6, 2)

    def validation_step(self, batch, _):
        return self(batch[0])

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 6)))


def strictly_or_not(strategy: str, folder: str) -> list[str | list[bool]]:
    """Load a checkpoint of adapters into a module with one layer more, strictly and not."""
    checkpoint, found = Path(folder) / "a.ckpt", []
    first = trainer(strategy=strategy, devices=2, max_steps=-1, max_epochs=1)
    first.fit(Plain())
    weights = {name: tensor.clone() for name, tensor in engine_of(first).named_full_weights()}
    first.save_checkpoint(checkpoint)
    for strict in (True, False):
        module, fresh = Extended(strict), Extended(strict).state_dict()
        ours = trainer(strategy=strategy, devices=2)
        try:
            ours.validate(module, ckpt_path=checkpoint, verbose=False)
        except (RuntimeError, CheckpointError) as error:
            found.append(str(error))
            continue
        loaded = {name: whole(parameter).cpu() for name, parameter in module.named_parameters()}
        own = [torch.equal(loaded[name], fresh[name]) for name in ("extra.weight", "extra.bias")]
        trained = [torch.equal(loaded[name], value) for name, value in weights.items() if name in loaded]
        found.append([all(own), all(trained), len(trained) > 8])
    return found
