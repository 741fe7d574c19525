"""Checkpoints of low-rank adapters as checkpoints of whole weights, so that their mean is that of what they compute."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_tricks.engines import Stored, Whole
from lightning_tricks.errors import CheckpointError
from lightning_tricks.functional import fingerprint, same_fingerprint
from lightning_tricks.layers import LoRALinear

__all__ = ["AdapterMerger"]

_DOWN, _UP = ".lora_A", ".lora_B"
_WHY = "the mean of A and of B apart is not the mean of the products BA"


class AdapterMerger:
    """Replaces the adapters of an open checkpoint by the weights that they come to.

    `X.weight` becomes `W + alpha / rank * (A.T @ B).T` and `X.lora_B` zero, so that the result loads strictly into the
    same module, and computes the same. Checkpoints without adapters are left as they are.

    Args:
        module: built on the base as the members were trained; None refuses adapters.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._fingerprints: dict[str, dict[str, str]] = {}

    def __call__(self, stored: Stored) -> Stored:
        """The checkpoint with whole weights.

        Raises:
            CheckpointError: naming the file and its first tensor that cannot be merged.
        """
        keys = [name for name in stored.weights if name.rpartition(".")[2].startswith("lora_") or ".lora_" in name]
        if not keys:
            return stored
        if self._module is None:
            raise CheckpointError(
                f"{stored.path} holds adapters (`{keys[0]}`), and {_WHY}: pass `module=`, a module built on their base,"
                " so that each is merged into it first."
            )
        weights, base = dict(stored.weights), dict(self._module.named_parameters())
        prefixes = list(self._prefixes(stored, keys))
        self._verify(stored, base)
        for prefix in prefixes:
            weights |= self._merged(stored, prefix, base)
        return replace(stored, weights=weights)

    def _prefixes(self, stored: Stored, keys: list[str]) -> Iterator[str]:
        for name in keys:
            prefix, dot, kind = name.rpartition(".")
            if dot + kind not in (_DOWN, _UP):
                raise CheckpointError(
                    f"{stored.path} holds `{name}`, which is not an adapter of LoRAMixin's, and {_WHY}: merge it into"
                    " its base with the library that wrote it."
                )
            if dot + kind == _DOWN:
                yield prefix

    def _merged(self, stored: Stored, prefix: str, base: dict[str, nn.Parameter]) -> dict[str, Whole]:
        layer = self._layer(stored, prefix)
        scale, name = layer.lora_alpha / layer.lora_rank, f"{prefix}.weight"
        shapes = [whole.shape for part in (_DOWN, _UP) if (whole := stored.weights.get(prefix + part))]
        if shapes != [tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)]:
            raise CheckpointError(
                f"{stored.path}: `{prefix}{_DOWN}` and its counterpart have the shapes {shapes}, and in `module`"
                f" {[tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)]}: build it with the members' rank."
            )

        def weight() -> Tensor:
            own = stored.tensor(name) if name in stored.weights else base[name].detach().cpu()
            down, up = stored.tensor(prefix + _DOWN), stored.tensor(prefix + _UP)
            return torch.addmm(own.float(), up.float().t(), down.float(), alpha=scale).to(own.dtype)

        def nothing() -> Tensor:
            return torch.zeros(shapes[1], dtype=stored.weights[prefix + _UP].dtype)

        dtype = stored.weights[name].dtype if name in stored.weights else base[name].dtype
        up = stored.weights[prefix + _UP]
        return {name: Whole(dtype, tuple(layer.weight.shape), weight), prefix + _UP: replace(up, read=nothing)}

    def _layer(self, stored: Stored, prefix: str) -> LoRALinear:
        try:
            layer = self._module.get_submodule(prefix) if self._module is not None else None
        except AttributeError:
            layer = None
        if type(layer) is not LoRALinear:
            raise CheckpointError(
                f"{stored.path} holds `{prefix}{_DOWN}`, and `{prefix}` in `module` is"
                f" {'absent' if layer is None else 'a ' + type(layer).__name__}: build it as the members were trained."
            )
        recorded = _recorded(stored, prefix)
        if recorded and not math.isclose(recorded["alpha"] / recorded["rank"], layer.lora_alpha / layer.lora_rank):
            raise CheckpointError(
                f"{stored.path}: `{prefix}` was trained with alpha={recorded['alpha']:g} and rank={recorded['rank']},"
                f" and `module` has alpha={layer.lora_alpha:g}: build it as the members were trained."
            )
        return layer

    def _verify(self, stored: Stored, base: dict[str, nn.Parameter]) -> None:
        """Refuse a member that was trained beside other frozen weights than the module's."""
        recorded = (stored.rest.get("lightning_tricks") or {}).get("base") or {}
        if not recorded:
            rank_zero_warn(f"{stored.path} does not say which base it was trained on: `module` is taken for it.")
        for name, expected in recorded.items():
            if name in base and name not in self._fingerprints:
                self._fingerprints[name] = fingerprint(base[name])
            if name not in base or not same_fingerprint(expected, self._fingerprints[name]):
                raise CheckpointError(
                    f"{stored.path} was trained beside another `{name}` than that of `module`: build it on the base"
                    " that the members were trained on."
                )


def _recorded(stored: Stored, prefix: str) -> Any:
    """The options of the innermost adapted module around a layer."""
    adapted = (stored.rest.get("lightning_tricks") or {}).get("lora") or {}
    around = [name for name in adapted if not name or prefix == name or prefix.startswith(f"{name}.")]
    return adapted[max(around, key=len)] if around else None
