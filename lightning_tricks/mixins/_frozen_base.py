"""Checkpoints without the frozen weights: left out when saving, recognised when loading."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.functional import fingerprint, same_fingerprint
from lightning_tricks.layers import AdaptedLayer, adapted_layers, packed_layers

__all__ = ["FrozenBase"]

_COMPILED = "_orig_mod."  # torch.compile puts it into names; checkpoints are the same compiled or not


class FrozenBase:
    """The modules of a LightningModule whose frozen parameters its checkpoints leave out.

    Hooks on the LightningModule do it: whichever engine asks it for a state dict, or loads one, meets them. Which
    parameters are frozen is asked anew each time. Buffers stay in.
    """

    def __init__(self, owner: LightningModule) -> None:
        self._prefixes: list[str] = []
        self._fingerprints: dict[str, dict[str, str]] = {}
        self.loading_under = ""
        owner.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        owner.register_load_state_dict_pre_hook(_note_prefix)  # type: ignore[no-untyped-call]
        owner.register_load_state_dict_post_hook(_tolerate_frozen)  # type: ignore[no-untyped-call]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The modules' names."""
        return tuple(self._prefixes)

    def add(self, prefix: str) -> None:
        """Count the module of this name in."""
        if prefix not in self._prefixes:
            self._prefixes.append(prefix)

    def forget(self) -> None:
        """Drop the fingerprints: between one run and the next, the weights may be replaced."""
        self._fingerprints.clear()

    def parameters(self, owner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's frozen parameters, under every name that they have in `owner`; adapters at rest are none."""
        own = {id(p) for _, layer in adapted_layers(owner) for n in layer.adapters for p in _values(layer, n)}
        for prefix in self._prefixes:
            for name, parameter in owner.get_submodule(prefix).named_parameters(prefix, remove_duplicate=False):
                if not parameter.requires_grad and id(parameter) not in own:
                    yield name, parameter

    def fingerprints(self, owner: nn.Module) -> dict[str, dict[str, str]]:
        """The fingerprint of each frozen parameter, computed when first asked for in a run. Collective."""
        found = {}
        packed = {id(layer.kept): layer for _, layer in packed_layers(owner)}
        for raw_name, parameter in self.parameters(owner):
            name = raw_name.replace(_COMPILED, "")
            if (layer := packed.get(id(parameter))) is not None:  # of the weight that was packed: the same base
                found[name.removesuffix(layer.key) + "weight"] = layer.original
                continue
            if name not in self._fingerprints:
                self._fingerprints[name] = fingerprint(whole(parameter))
            found[name] = self._fingerprints[name]
        return found

    def verify(self, owner: nn.Module, recorded: Mapping[str, dict[str, str]], entries: Collection[str]) -> None:
        """Refuse a checkpoint that was trained on other weights than those of `owner`. Collective.

        Args:
            owner: the LightningModule that is about to load it.
            recorded: the fingerprints that the checkpoint holds.
            entries: the names in its state dict; empty if the engine keeps that elsewhere.

        Raises:
            CheckpointError: naming the first tensor that differs.
        """
        present = self.fingerprints(owner)
        for name in present:
            if name not in recorded and entries and name not in entries:
                raise CheckpointError(
                    f"`{name}` is neither in this checkpoint nor in the base it was trained on. {_REMEDY}"
                )
        for name, expected in recorded.items():
            if name not in present:
                raise CheckpointError(
                    f"This checkpoint was trained beside a frozen `{name}`, here there is none. {_REMEDY}"
                )
            if not same_fingerprint(expected, present[name]):
                raise CheckpointError(
                    f"`{name}` is not the tensor that this checkpoint was trained on (there {_told(expected)}, here "
                    f"{_told(present[name])}). {_REMEDY}"
                )


_REMEDY = "Build the module on the base model, and with the `adapt` options, that the checkpoint was trained with."


def _told(found: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items())


def _values(layer: AdaptedLayer, name: str) -> Iterator[nn.Parameter]:
    yield from layer.adapter_parameters(name).values()


def _refuse_merged(owner: Any, what: str) -> None:
    if any(layer.merged is not None for _, layer in adapted_layers(owner)):
        raise MisconfigurationError(
            f"adapters are merged into the base, and {what} now would apply them twice later: call "
            "`unmerge_adapters()` first, or write the merged weights by `export_merged(file)`."
        )


def _drop_frozen(owner: Any, state_dict: dict[str, Any], prefix: str, _local_metadata: Any) -> None:
    _refuse_merged(owner, "saving")
    for name, _ in owner._frozen_base.parameters(owner):
        state_dict.pop(prefix + name, None)


def _note_prefix(owner: Any, _state_dict: Any, prefix: str, *_rest: Any) -> None:
    _refuse_merged(owner, "loading")
    owner._frozen_base.loading_under = prefix


def _tolerate_frozen(owner: Any, incompatible: Any) -> None:
    prefix = owner._frozen_base.loading_under
    frozen = {prefix + name for name, _ in owner._frozen_base.parameters(owner)}
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in frozen]
