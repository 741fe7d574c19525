"""Which weights of a file are (inputs, outputs), as those of Hugging Face's Conv1D are."""

from collections.abc import Sequence

from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.mixins._adapter_folder import AdapterFolder
from lightning_tricks.storage import WeightsFile

__all__ = ["transposed_layers"]


def transposed_layers(content: AdapterFolder, weights: WeightsFile, paths: Sequence[str]) -> set[str]:
    """The layers whose weight lies the other way round, each by its shape; a square one as all the others do.

    `fan_in_fan_out` of peft's configuration is one for all layers, whose kinds may differ.

    Args:
        content: the adapter.
        weights: the base's file.
        paths: the layers that the adapter changes.

    Raises:
        CheckpointError: if a shape is neither.
        MisconfigurationError: if a square weight is among layers of both kinds, and the folder does not say of which.
    """
    told = bool(content.config.get("fan_in_fan_out", False))
    known, square = {}, []
    for path in paths:
        shape = weights.layout.get(f"{path}.weight", (None, ()))[1]
        if len(shape) != 2 or f"{path}.lora_embedding_A" in content.tensors:
            continue
        found = _by_shape(content, path, shape)
        if found is not None:
            known[path] = found
        elif content.transposed is not None:
            known[path] = path in content.transposed
        else:
            square.append(path)
    if square and any(found != told for found in known.values()):
        raise MisconfigurationError(
            f"`{square[0]}` is square, and {content.path} does not say whether its weight is (inputs, outputs), as "
            "other layers' are not as its `fan_in_fan_out` says: load it in Python and use `export_merged`."
        )
    return {path for path, found in known.items() if found} | (set(square) if told else set())


def _by_shape(content: AdapterFolder, path: str, shape: tuple[int, ...]) -> bool | None:
    outputs, inputs = _sizes(content, path)
    fits = [(outputs in (None, first) and inputs in (None, second)) for first, second in (shape, (shape[1], shape[0]))]
    if not any(fits):
        raise CheckpointError(
            f"the weight of `{path}` has the shape {list(shape)}, and the adapter in {content.path} is for "
            f"{outputs or 'any'} outputs and {inputs or 'any'} inputs."
        )
    return None if all(fits) else fits[1]


def _sizes(content: AdapterFolder, path: str) -> tuple[int | None, int | None]:
    """The layer's outputs and inputs, as far as the adapter's tensors tell."""
    if (factors := content.tensors.get(f"{path}.ia3_l")) is not None:
        return (None, factors.shape[1]) if factors.shape[0] == 1 else (factors.shape[0], None)
    down, up = (content.tensors.get(f"{path}.lora_{part}.weight") for part in "AB")
    return up.shape[0] if up is not None else None, down.shape[1] if down is not None else None
