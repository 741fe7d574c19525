"""Checkpoints of low-rank adapters as checkpoints of whole weights, so that their mean is that of what they compute."""

from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_tricks.engines import Stored, Whole
from lightning_tricks.errors import CheckpointError
from lightning_tricks.layers import LowRankLayer

__all__ = ["AdapterMerger"]

_DOWN, _UP = ".lora_A", ".lora_B"
_WHY = "the mean of A and of B apart is not the mean of the products BA"


class AdapterMerger:
    """Replaces the adapters of an open checkpoint by the weights that they come to.

    `X.weight` becomes `W + scale * B.T @ A` and `X.lora_B` zero, so that the result loads strictly into the same
    module, and computes the same. Checkpoints without adapters are left as they are.

    Args:
        module: built on the base as the members were trained; None refuses adapters.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module

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
        for name in keys:
            if not name.endswith((_DOWN, _UP)):
                raise CheckpointError(
                    f"{stored.path} holds `{name}`, which is not of a single plain LoRA adapter, and {_WHY}: merge it"
                    " into its base before, with the library that wrote it."
                )
        self._verify(stored, self._module)
        weights = dict(stored.weights)
        for name in keys:
            if name.endswith(_DOWN):
                weights |= self._merged(stored, name.removesuffix(_DOWN), self._module)
        return replace(stored, weights=weights)

    def _merged(self, stored: Stored, prefix: str, module: nn.Module) -> dict[str, Whole]:
        layer = _layer(stored, prefix, module)
        name, base, scale = f"{prefix}.weight", cast(Tensor, layer.weight).detach(), layer.adapters["default"].scale
        own = stored.weights.get(name)

        def weight() -> Tensor:
            start = base.cpu() if own is None else stored.tensor(name)
            down, up = layer.assemble("default", stored.tensor(prefix + _DOWN), stored.tensor(prefix + _UP))
            update = torch.mm(up.float().t(), down.float())
            merged = torch.add(
                layer.as_matrix(start).to(torch.promote_types(start.dtype, torch.float32)), update, alpha=scale
            )
            return layer.as_weight(merged).to(start.dtype).contiguous()

        up = stored.weights[prefix + _UP]
        nothing = replace(up, read=lambda: torch.zeros(up.shape, dtype=up.dtype), fill=None)
        whole = Whole(base.dtype if own is None else own.dtype, tuple(base.shape), weight)
        return {name: whole, prefix + _UP: nothing}

    def _verify(self, stored: Stored, module: nn.Module) -> None:
        """Let the module refuse adapters that were trained beside other weights, or with other options."""
        if "base" not in (stored.rest.get("lightning_tricks") or {}):
            rank_zero_warn(f"{stored.path} does not say which base it was trained on: `module` is taken for it.")
        elif isinstance(module, LightningModule):
            empty = {name: torch.empty(each.shape, device="meta") for name, each in stored.weights.items()}
            try:
                module.on_load_checkpoint({**stored.rest, "state_dict": empty})
            except CheckpointError as error:
                raise CheckpointError(f"{stored.path} does not fit `module`: {error}") from error


def _layer(stored: Stored, prefix: str, module: nn.Module) -> LowRankLayer:
    """The layer of the module that a pair of factors belongs to, if they can be merged into it."""
    try:
        layer: Any = module.get_submodule(prefix)
    except AttributeError:
        layer = None
    if not isinstance(layer, LowRankLayer) or list(layer.adapters) != ["default"] or layer.merged is not None:
        found = "absent" if layer is None else f"a {type(layer).__name__}"
        raise CheckpointError(
            f"{stored.path} holds `{prefix}{_DOWN}`, and `{prefix}` in `module` is {found}, without one adapter that is"
            " not merged: build it as the members were trained."
        )
    if layer.packing is not None:
        raise CheckpointError(
            f"{stored.path} holds adapters (`{prefix}{_DOWN}`) whose weight `module` keeps in {layer.packing.kind}: a"
            " merged one would be rounded to it again, which loses most of the update. Write each member's merged"
            " weights by `export_merged(file)` and average those files, or keep the members apart in a"
            " PredictionEnsemble."
        )
    options = layer.adapters["default"]
    if options.decomposed or options.init == "pissa":
        kind = "DoRA" if options.decomposed else "PiSSA"
        raise CheckpointError(
            f"{stored.path} holds {kind} adapters (`{prefix}{_DOWN}`), which are not averaged: {_WHY}."
        )
    for part, own in ((_DOWN, layer.lora_A), (_UP, layer.lora_B)):
        given, wanted = stored.weights.get(prefix + part), list(cast(Tensor, own).shape)
        if given is None or list(given.shape) != wanted:
            told = "is absent" if given is None else f"has the shape {list(given.shape)}"
            raise CheckpointError(
                f"{stored.path}: `{prefix}{part}` {told}, and has the shape {wanted} in `module`: build it with the"
                " members' rank."
            )
    return layer
