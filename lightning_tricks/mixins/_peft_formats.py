"""Between our adapters and peft's files: which configuration and names go with which method."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.layers import LowRankLayer, ScaledLayer
from lightning_tricks.mixins._adapter_folder import AdapterFolder
from lightning_tricks.mixins._method import Method, layers_of
from lightning_tricks.mixins.dora import DoRA
from lightning_tricks.mixins.ia3 import IA3
from lightning_tricks.mixins.lora import LoRA
from lightning_tricks.mixins.prompts import PrefixTuning, PromptTuning, exported_prompt

__all__ = ["exported", "fill", "method_of"]

_LOW_RANK = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)")
_SCALED = re.compile(r"(.+)\.(ia3_l)")
_PROMPT = re.compile("()(prompt_embeddings)")
_KNOWN = {"LORA": _LOW_RANK, "IA3": _SCALED, "PROMPT_TUNING": _PROMPT, "PREFIX_TUNING": _PROMPT}
# Options of peft's LoRA that change what its tensors mean, with the values at which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that do


# -- writing -----------------------------------------------------------------------------------------------------------


def exported(method: Method, module: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and tensors of one adapter. Collective.

    Raises:
        MisconfigurationError: if peft has no such method.
    """
    if isinstance(method, LoRA):
        config, tensors = _export_low_rank(method, module, name)
    elif isinstance(method, IA3):
        config, tensors = _export_scaled(module, name)
    elif isinstance(method, PromptTuning | PrefixTuning):
        config, tensors = exported_prompt(module, name)
    else:
        raise MisconfigurationError(
            f"peft has no {type(method).__name__}, so that its format cannot hold one: keep a checkpoint, or "
            "`export_merged` for the whole model."
        )
    saved, others = _trained_beside(module)
    config |= {
        "base_model_name_or_path": getattr(getattr(module, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": saved or None,
    }
    return {"task_type": None, **config}, tensors | others


def _export_low_rank(method: LoRA, module: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    transposed = False
    for path, layer in layers_of(module, name).items():
        if not isinstance(layer, LowRankLayer):
            continue
        down, up = layer.assemble(name, _whole(layer, "lora_A", name), _whole(layer, "lora_B", name))
        ranks[path] = down.shape[0]  # with a start to subtract, or several slices, more than the option says
        alphas[path] = layer.adapters[name].scale * (ranks[path] ** 0.5 if method.rslora else ranks[path])
        tensors |= {f"{path}.{key}": value for key, value in _named(layer, down, up).items()}
        if layer.adapters[name].decomposed:
            tensors[f"{path}.lora_magnitude_vector"] = _whole(layer, "lora_magnitude", name)
        transposed = transposed or bool(getattr(layer, "transposed", False))
    (rank, _), *_ = Counter(ranks.values()).most_common()
    (alpha, _), *_ = Counter(alphas.values()).most_common()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
        "use_rslora": method.rslora,
        "use_dora": method.decomposed,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "init_lora_weights": True,
    }
    return config, tensors


def _whole(layer: Any, kind: str, name: str) -> Tensor:
    return whole(layer.own(kind, name)).float().cpu()


def _named(layer: LowRankLayer, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if isinstance(layer, nn.Embedding):
        return {"lora_embedding_A": down, "lora_embedding_B": up.t()}
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        ones = [1] * len(layer.kernel_size)
        return {"lora_A.weight": layer.as_weight(down), "lora_B.weight": up.t().reshape(*up.t().shape, *ones)}
    return {"lora_A.weight": down, "lora_B.weight": up.t()}


def _export_scaled(module: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, inputs, transposed = {}, [], False
    for path, layer in layers_of(module, name).items():
        if isinstance(layer, ScaledLayer):
            factors = _whole(layer, "ia3_l", name)
            of_inputs = layer.adapters[name].inputs
            tensors[f"{path}.ia3_l"] = factors[None, :] if of_inputs else factors[:, None]
            inputs += [path] if of_inputs else []
            transposed = transposed or layer.output_axis == 1
    targets = [key.removesuffix(".ia3_l") for key in tensors]
    return {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": inputs,
        "fan_in_fan_out": transposed,
        "init_ia3_weights": True,
    }, tensors


def _trained_beside(module: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """What is trained in the base itself, by modules that are trained as a whole: the format knows no others."""
    adapters = {
        id(p) for _, layer in _all(module) for n in layer.adapters for p in layer.adapter_parameters(n).values()
    }
    modules: list[str] = []
    tensors: dict[str, Tensor] = {}
    for path, parameter in module.named_parameters():
        if not parameter.requires_grad or id(parameter) in adapters:
            continue
        owner = path.rpartition(".")[0]
        if not owner or not all(p.requires_grad for p in module.get_submodule(owner).parameters()):
            raise MisconfigurationError(
                f"`{path}` is trained, but not all of `{owner}`, and peft's format holds whole modules only: name "
                f"`{owner}` in `trainable`, or keep a checkpoint instead."
            )
        modules += [] if owner in modules else [owner]
        tensors[path] = whole(parameter).float().cpu()
    for owner in modules:
        for key, buffer in module.get_submodule(owner).named_buffers():
            tensors[f"{owner}.{key}"] = buffer.detach().cpu()
    return modules, tensors


def _all(module: nn.Module) -> Any:
    from lightning_tricks.layers import adapted_layers

    return adapted_layers(module)


# -- reading -----------------------------------------------------------------------------------------------------------


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
    others = [key for key in folder.tensors if not _KNOWN[kind].fullmatch(key)]
    saved = tuple(folder.config.get("modules_to_save") or ())
    for key in others:
        if not any(f".{key}".find(f".{module}.") >= 0 for module in saved):
            raise CheckpointError(f"{folder.path} holds a tensor {key!r} that no adapter of the type {kind} has.")
    method = _METHODS[kind](folder)
    return method, tuple(others)


def _low_rank_method(folder: AdapterFolder) -> Method:
    config = folder.config
    for option, plain in _PLAIN.items():
        if config.get(option, plain[0]) not in plain:
            raise CheckpointError(f"{folder.path} was made with {option}={config[option]!r}, which has no counterpart.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{folder.path} starts by {start!r}, which changes the base itself: save it with peft's "
            "`path_initial_model_for_weight_conversion`, which makes a plain LoRA of it."
        )
    downs = {path: t for path, key, t in _parts(folder) if key in ("lora_A.weight", "lora_embedding_A")}
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
    for path, _, tensor in _parts(folder):
        (inputs if tensor.shape[0] == 1 and tensor.dim() == 2 else outputs).append(path)
    _require_targets(folder, [*inputs, *outputs])
    return IA3(targets=tuple(outputs), feedforward=tuple(inputs))


def _prompt_method(folder: AdapterFolder) -> Method:
    tokens = int(_parts(folder)[0][2].shape[0])
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


def _parts(folder: AdapterFolder) -> list[tuple[str, str, Tensor]]:
    """The adapter's tensors: the layer's path, the kind, the values."""
    pattern = _KNOWN[folder.config["peft_type"]]
    found = [(pattern.fullmatch(key), tensor) for key, tensor in folder.tensors.items()]
    parts = [(match[1], match[2], tensor) for match, tensor in found if match is not None]
    if not parts:
        raise CheckpointError(f"{folder.path} holds no tensor of an adapter of the type {folder.config['peft_type']}.")
    return parts


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


def fill(module: nn.Module, name: str, folder: AdapterFolder) -> None:
    """Put the folder's tensors into the adapter of this name.

    Raises:
        CheckpointError: if one is missing, too many, or has another shape.
    """
    layers = layers_of(module, name)
    wanted: dict[str, Tensor] = {}
    for path, layer in layers.items():
        wanted |= {f"{path}.{kind}": value for kind, value in layer.adapter_parameters(name).items()}
    given = {_place(folder, path, kind): _ours(kind, t) for path, kind, t in _parts(folder)}
    others = {key: t for key, t in folder.tensors.items() if not _KNOWN[folder.config["peft_type"]].fullmatch(key)}
    entries = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wanted |= {key: entries[key] for key in others if key in entries}
    given |= others
    _require_the_same_names(folder, wanted, given)
    with torch.no_grad():
        for key, value in given.items():
            if wanted[key].shape != value.shape:
                raise CheckpointError(
                    f"{folder.path}: `{key}` has the shape {list(value.shape)}, and this module's has "
                    f"{list(wanted[key].shape)}."
                )
        for key, value in given.items():
            wanted[key].copy_(value)


def _place(folder: AdapterFolder, path: str, kind: str) -> str:
    if kind == "prompt_embeddings":
        return "prompts.prompt" if folder.config["peft_type"] == "PROMPT_TUNING" else "prompts.prefix"
    return f"{path}.{_OURS[kind]}"


def _require_the_same_names(folder: AdapterFolder, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for key in wanted:
        if key not in given:
            raise CheckpointError(f"{folder.path} lacks the tensor for `{key}`.")
    for key in given:
        if key not in wanted:
            raise CheckpointError(f"{folder.path} holds a tensor for `{key}`, for which there is no place here.")


_OURS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "ia3_l": "ia3_l",
}


def _ours(kind: str, tensor: Tensor) -> Tensor:
    """A tensor of peft's in our layout: B is transposed, kernels are flat, and an embedding's A stands upright."""
    if kind in ("lora_B.weight", "lora_embedding_B"):
        return tensor.flatten(1).t() if tensor.dim() > 2 else tensor.t()
    if kind == "lora_embedding_A":
        return tensor.t()
    if kind == "lora_A.weight":
        return tensor.flatten(1)
    return tensor if kind == "prompt_embeddings" else tensor.flatten()
