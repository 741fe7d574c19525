"""An adapter folder merged into a file of its base's weights, without building the model."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import fingerprint, path_matches, same_fingerprint
from lightning_tricks.mixins._adapter_folder import AdapterFolder, read_folder
from lightning_tricks.mixins._peft_method import method_of, require_copies
from lightning_tricks.mixins._transposed import transposed_layers
from lightning_tricks.mixins.ia3 import IA3
from lightning_tricks.mixins.lora import LoRA
from lightning_tricks.storage import WeightsFile, write_weights

__all__ = ["merge_folder"]


def merge_folder(folder: Path, base: Path, out: Path) -> int:
    """Write the base's weights with an adapter in them, one tensor in memory at a time.

    Args:
        folder: an adapter that peft or `save_adapter` wrote, of LoRA, DoRA or IA3.
        base: the safetensors file of the model that it was trained on, under the same names.
        out: the file to write, ending in `.safetensors`.

    Returns:
        How many tensors the adapter changes.

    Raises:
        CheckpointError: if a file is missing or malformed, or the base is another one: the first tensor is named.
        MisconfigurationError: if the method cannot be merged, or `out` has another ending.
    """
    content, weights = read_folder(folder), WeightsFile(base)
    if out.suffix != ".safetensors":
        raise MisconfigurationError(f"the merged file must end in .safetensors, got {str(out)!r}.")
    changes = _changes(content, weights)
    _require_the_base(content, weights, changes)

    def entries() -> Iterator[tuple[str, Tensor]]:
        for name in weights.names:
            tensor = weights.tensor(name)
            yield name, changes[name](tensor).to(tensor.dtype) if name in changes else tensor

    write_weights(out, weights.layout, entries(), weights.metadata)
    return len(changes)


class _LowRank:
    """What LoRA or DoRA makes of a layer's weight."""

    def __init__(self, parts: Mapping[str, Tensor], scale: float, transposed: bool) -> None:
        self.parts, self.scale, self.transposed = parts, scale, transposed

    def __call__(self, weight: Tensor) -> Tensor:
        table = "lora_embedding_A" in self.parts
        down, up = (self.parts["lora_embedding_" + x if table else f"lora_{x}.weight"] for x in "AB")
        update = up.float().flatten(1) @ down.float().flatten(1)
        flipped = table or self.transposed
        matrix = weight.float().t() if flipped else weight.float().flatten(1)
        merged = matrix + self.scale * update
        if (lengths := self.parts.get("lora_magnitude_vector")) is not None:
            merged = merged * (lengths.float().flatten() / merged.norm(dim=1).clamp_min(1e-12))[:, None]
        return merged.t().contiguous() if flipped else merged.view(weight.shape)


class _Scaled:
    """What IA3 makes of a layer's weight or bias."""

    def __init__(self, factors: Tensor, transposed: bool) -> None:
        self.factors = factors.t() if transposed else factors

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.float() * (self.factors.float().flatten() if weight.dim() == 1 else self.factors.float())


def _changes(content: AdapterFolder, weights: WeightsFile) -> dict[str, "_LowRank | _Scaled"]:
    method, others = method_of(content)
    if others:
        raise MisconfigurationError(
            f"{content.path} holds `{others[0]}` besides its adapters, a trained part of the model itself: load it in "
            "Python and use `export_merged`."
        )
    if isinstance(method, LoRA):
        flipped = transposed_layers(content, weights, method.targets)
        return {f"{path}.weight": _low_rank(content, method, path, path in flipped) for path in method.targets}
    if isinstance(method, IA3):
        paths = (*method.targets, *method.feedforward)
        flipped = transposed_layers(content, weights, paths)
        found = {f"{path}.weight": _Scaled(content.tensors[f"{path}.ia3_l"], path in flipped) for path in paths}
        biases = {f"{path}.bias": _Scaled(content.tensors[f"{path}.ia3_l"], False) for path in method.targets}
        return {**found, **biases}
    raise MisconfigurationError(f"{type(method).__name__} cannot be merged: {method.reason}")


def _low_rank(content: AdapterFolder, method: LoRA, path: str, transposed: bool) -> _LowRank:
    parts = {key.removeprefix(f"{path}."): t for key, t in content.tensors.items() if key.startswith(f"{path}.")}
    for needed in ("lora_A.weight", "lora_B.weight") if "lora_embedding_A" not in parts else ("lora_embedding_B",):
        if needed not in parts:
            raise CheckpointError(f"{content.path} lacks the tensor `{path}.{needed}`.")
    rank, alpha = (_of(values, path) for values in (method.rank, method.alpha))
    return _LowRank(parts, alpha / (rank**0.5 if method.rslora else rank), transposed)


def _of(values: float | Mapping[str, float], path: str) -> float:
    if not isinstance(values, Mapping):
        return values
    return next(value for pattern, value in values.items() if path_matches(pattern, path))


def _require_the_base(content: AdapterFolder, weights: WeightsFile, changes: Mapping[str, object]) -> None:
    alike = {name: [other for other in names if other != name] for names in content.tied for name in names}
    for name in changes:
        if name not in weights.layout and not name.endswith(".bias"):
            raise CheckpointError(f"{weights.path} has no `{name}`, which the adapter in {content.path} changes.")
        if name in weights.layout and alike.get(name):
            raise MisconfigurationError(
                f"`{name}` is `{alike[name][0]}` too, which the adapter in {content.path} does not change, and a merge "
                "would: keep the adapter apart from its base."
            )

    def find(name: str) -> dict[str, str] | None:
        return fingerprint(weights.tensor(name)) if name in weights.layout else None

    require_copies(content, find)
    for name, expected in content.base.items():
        if name not in weights.layout and any(other in weights.layout for other in alike.get(name, ())):
            continue  # files of tied weights hold them under one name, which is looked at as well
        if name not in weights.layout or not same_fingerprint(expected, fingerprint(weights.tensor(name))):
            raise CheckpointError(
                f"`{name}` in {weights.path} is not the tensor that the adapter in {content.path} was trained on: give "
                "the base that it was trained on."
            )
