"""Our adapters as peft's: the configuration and the tensors that go with each method."""

from collections import Counter
from typing import Any

from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import LowRankLayer, ScaledLayer, adapted_layers
from lightning_tricks.mixins._method import Method, layers_of
from lightning_tricks.mixins.ia3 import IA3
from lightning_tricks.mixins.lora import LoRA
from lightning_tricks.mixins.prompts import PrefixTuning, PromptTuning, exported_prompt

__all__ = ["exported"]


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
            f"peft has no {type(method).__name__}, so that its format cannot hold one: keep a checkpoint"
            f"{', or `export_merged` for the whole model' if method.in_base else ''}."
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
        id(p)
        for _, layer in adapted_layers(module)
        for n in layer.adapters
        for p in layer.adapter_parameters(n).values()
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
