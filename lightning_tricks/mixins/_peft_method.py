"""Which of our methods an adapter of peft's is, by its configuration and tensors."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_tricks.errors import CheckpointError
from lightning_tricks.functional import fingerprint, same_fingerprint
from lightning_tricks.mixins._adapter_folder import AdapterFolder
from lightning_tricks.mixins._method import Method
from lightning_tricks.mixins._peft_options import require_known_options
from lightning_tricks.mixins.dora import DoRA
from lightning_tricks.mixins.ia3 import IA3
from lightning_tricks.mixins.lora import LoRA
from lightning_tricks.mixins.prompts import PrefixTuning, PromptTuning

__all__ = ["beside", "method_of", "parts", "require_copies"]


_LOW_RANK = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
_SCALED = re.compile(r"(.+)\.(ia3_l)")
_PROMPT = re.compile("()(prompt_embeddings)")
_KNOWN = {"LORA": _LOW_RANK, "IA3": _SCALED, "PROMPT_TUNING": _PROMPT, "PREFIX_TUNING": _PROMPT}


def method_of(folder: AdapterFolder) -> tuple[Method, tuple[str, ...]]:
    """The method whose adapter a folder holds, and what else is trained with it.

    Raises:
        CheckpointError: if the type is unknown, an option has no counterpart, or the tensors do not fit the options.
    """
    kind = folder.config["peft_type"]
    if kind not in _KNOWN:
        raise CheckpointError(
            f"{folder.path} holds an adapter of the type {kind!r}, which is unknown here: known are "
            f"{', '.join(sorted(_KNOWN))}."
        )
    require_known_options(folder)
    return _METHODS[kind](folder), tuple(beside(folder))


def _low_rank_method(folder: AdapterFolder) -> Method:
    config = folder.config
    downs = {path: t for path, key, t in parts(folder) if key in ("lora_A.weight", "lora_embedding_A")}
    ranks = {path: int(t.shape[0]) for path, t in downs.items()}
    alphas = {
        path: float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))) for path in ranks
    }
    for path, rank in ranks.items():
        told = _by_pattern(config.get("rank_pattern"), path, config.get("r", 8))
        if rank != told:
            raise CheckpointError(f"{folder.path}: `{path}` has the rank {rank}, and the configuration says {told}.")
    _require_targets(folder, list(ranks))
    policy = DoRA if config.get("use_dora") else LoRA
    return policy(
        rank=_one_or_all(ranks),
        alpha=_one_or_all(alphas),
        targets=tuple(ranks),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora", False)),
    )


def _scaled_method(folder: AdapterFolder) -> Method:
    inputs: list[str] = []
    outputs: list[str] = []
    for path, _, tensor in parts(folder):
        (inputs if tensor.shape[0] == 1 and tensor.dim() == 2 else outputs).append(path)
    _require_targets(folder, [*inputs, *outputs])
    return IA3(targets=tuple(outputs), feedforward=tuple(inputs))


def _prompt_method(folder: AdapterFolder) -> Method:
    tokens = int(parts(folder)[0][2].shape[0])
    if tokens != folder.config.get("num_virtual_tokens", tokens):
        raise CheckpointError(
            f"{folder.path} holds {tokens} vectors, and the configuration says {folder.config['num_virtual_tokens']}."
        )
    return PromptTuning(tokens=tokens) if folder.config["peft_type"] == "PROMPT_TUNING" else PrefixTuning(tokens=tokens)


_METHODS = {
    "IA3": _scaled_method,
    "LORA": _low_rank_method,
    "PREFIX_TUNING": _prompt_method,
    "PROMPT_TUNING": _prompt_method,
}


def parts(folder: AdapterFolder) -> list[tuple[str, str, Tensor]]:
    """The adapter's tensors: the layer's path, the kind, the values."""
    pattern = _KNOWN[folder.config["peft_type"]]
    matches = [(pattern.fullmatch(key), tensor) for key, tensor in folder.tensors.items()]
    found = [(match[1], match[2], tensor) for match, tensor in matches if match is not None]
    if not found:
        raise CheckpointError(f"{folder.path} holds no tensor of an adapter of the type {folder.config['peft_type']}.")
    return found


def beside(folder: AdapterFolder) -> dict[str, Tensor]:
    """The tensors that are not the adapter's: what is trained of the base itself, in modules that the options name."""
    return {key: tensor for key, tensor in _no_adapters(folder).items() if _is_saved(folder, key)}


def require_copies(folder: AdapterFolder, find: Callable[[str], dict[str, str] | None]) -> None:
    """All other tensors must be the base's own, as peft writes those of embeddings that are targets, or were resized.

    Args:
        folder: what was read.
        find: the fingerprint of the base's tensor of a name; None if there is none.

    Raises:
        CheckpointError: naming a tensor that the base does not have, or has otherwise.
    """
    for key, tensor in _no_adapters(folder).items():
        if _is_saved(folder, key):
            continue
        found = find(key.replace(".base_layer.", "."))
        if found is None:
            kind = folder.config["peft_type"]
            raise CheckpointError(f"{folder.path} holds a tensor {key!r} that no adapter of the type {kind} has.")
        if not same_fingerprint(fingerprint(tensor), found):
            raise CheckpointError(
                f"{folder.path} holds `{key}` of the base that it was trained on, and here that is another tensor: "
                "use that base. If its embeddings were resized or trained there, save the base along with it."
            )


def _no_adapters(folder: AdapterFolder) -> dict[str, Tensor]:
    pattern = _KNOWN[folder.config["peft_type"]]
    return {key: tensor for key, tensor in folder.tensors.items() if not pattern.fullmatch(key)}


def _is_saved(folder: AdapterFolder, key: str) -> bool:
    return any(f".{module}." in f".{key}" for module in folder.config.get("modules_to_save") or ())


def _require_targets(folder: AdapterFolder, paths: list[str]) -> None:
    targets = folder.config.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            raise CheckpointError(f"{folder.path} names the target {target!r}, and holds no tensors for it.")


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """As peft resolves it: a pattern is a regular expression for the end of a path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return otherwise


def _one_or_all(values: Mapping[str, Any]) -> Any:
    """One value if all are the same; else each by its path, the longest first, so that none hides another."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return dict(sorted(values.items(), key=lambda item: -len(item[0])))
