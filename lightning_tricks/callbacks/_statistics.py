"""Running statistics of normalisations, estimated anew for weights that no batch has been through."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_tricks.data import TricksDataLoader
from lightning_tricks.engines import Engine

__all__ = ["AveragedStatistics", "buffers_kept", "norms_of", "placed"]

Buffers = list[tuple[Tensor, Tensor]]  # a buffer, and what it is to hold
_COMPILED = "_orig_mod."


def norms_of(module: nn.Module) -> list[_NormBase]:
    """The normalisations that gather running statistics; not those that are frozen in eval() mode.

    Example:
        >>> [type(norm).__name__ for norm in norms_of(nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2)))]
        ['BatchNorm1d']
    """
    norms = [part for part in module.modules() if isinstance(part, _NormBase)]
    return [norm for norm in norms if norm.track_running_stats and norm.running_mean is not None and norm.training]


class AveragedStatistics:
    """The running statistics that belong to an average, estimated when they are asked for.

    Args:
        batches: how many training batches to estimate from; 0: none are kept.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._modes: list[tuple[nn.Module, bool]] = []
        self._norms: list[_NormBase] = []
        self._known: tuple[int, dict[str, Tensor]] = (0, {})  # the number of updates they belong to, and their values

    def begin(self, module: LightningModule) -> None:
        """Note which normalisations there are, and the modes that the module trains in."""
        self._modes = [(part, part.training) for part in module.modules()]
        self._norms = norms_of(module) if self._batches else []

    def known(self, updates: int) -> dict[str, Tensor]:
        """Those of an average with so many updates, by the buffers' names; empty if they are not known."""
        return self._known[1] if self._known[0] == updates else {}

    def take(self, updates: int, values: Mapping[str, Tensor]) -> None:
        """Take over those of a checkpoint."""
        self._known = (updates, dict(values))

    def missing(self, updates: int) -> bool:
        """Whether they would have to be estimated."""
        return bool(self._norms) and not self.known(updates)

    def buffers(self, trainer: Trainer, engine: Engine, updates: int) -> Buffers:
        """What the module's buffers are to hold beside its average, which it holds now. Collective."""
        module: LightningModule = trainer.lightning_module
        if self.missing(updates) and not trainer.interrupted:
            self._known = (updates, self._estimate(trainer, module, engine))
        return placed(module, self.known(updates))

    def _estimate(self, trainer: Trainer, module: LightningModule, engine: Engine) -> dict[str, Tensor]:
        """The equal mean over the batches of every rank, as `torch.optim.swa_utils.update_bn` takes it.

        Everything else that a training step changes is put back: buffers, random numbers, the loader's position;
        nothing is logged.
        """
        own = {id(buffer) for norm in self._norms for buffer in norm.buffers(recurse=False)}
        with ExitStack() as stack:
            for kept in (isolate_rng(), _generators_kept(trainer), _muted(module), _in_modes(self._modes)):
                stack.enter_context(kept)
            stack.enter_context(buffers_kept(module))
            stack.enter_context(_averaging(self._norms))
            for index, batch in enumerate(itertools.islice(_batches(trainer), self._batches)):
                engine.training_forward(_on_device(trainer, module, batch), index)
            found = {name: buffer.clone() for name, buffer in _named(module).items() if id(buffer) in own}
        return {name: _over_ranks(engine, tensor) for name, tensor in found.items()}


def placed(module: LightningModule, values: Mapping[str, Tensor]) -> Buffers:
    """The module's buffers of these names, each with its value."""
    named = _named(module)
    return [(named[name], value.to(named[name].device)) for name, value in values.items() if name in named]


def _named(module: LightningModule) -> dict[str, Tensor]:
    return {name.replace(_COMPILED, ""): buffer for name, buffer in module.named_buffers()}


def _over_ranks(engine: Engine, tensor: Tensor) -> Tensor:
    if engine.world_size == 1 or not tensor.is_floating_point():
        return tensor
    return engine.sum_over_ranks(tensor) / engine.world_size


def _batches(trainer: Trainer) -> Iterator[Any]:
    """From a copy of the training loader, so that the fit's own stays where it is."""
    combined: Any = trainer.fit_loop._combined_loader
    anew = CombinedLoader(_copied(combined.iterables), combined._mode)
    anew.limits = combined.limits
    for batch, *_ in iter(anew):
        yield batch


def _copied(loaders: Any) -> Any:
    if isinstance(loaders, dict):
        return {name: _copied(loader) for name, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)(_copied(loader) for loader in loaders)
    if isinstance(loaders, TricksDataLoader):
        return loaders.anew()
    anew = copy.copy(loaders)
    if hasattr(anew, "_iterator"):
        vars(anew)["_iterator"] = None  # workers that are kept, for the fit's own iteration
    return anew


@contextmanager
def _generators_kept(trainer: Trainer) -> Iterator[None]:
    """Those that the loaders and their samplers draw from, which copies share."""
    combined: Any = trainer.fit_loop._combined_loader
    places = [("generator",), ("sampler", "generator"), ("batch_sampler", "sampler", "generator")]
    found = [_attribute(loader, place) for loader in combined.flattened for place in places]
    states = [(each, each.get_state()) for each in found if isinstance(each, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _attribute(owner: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        owner = getattr(owner, name, None)
    return owner


def _on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    names = ("log", "log_dict")
    vars(module).update(dict.fromkeys(names, lambda *_, **__: None))
    try:
        yield
    finally:
        for name in names:
            vars(module).pop(name, None)


@contextmanager
def _in_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    found = [(part, part.training) for part, _ in modes]
    for part, training in modes:
        part.training = training
    try:
        yield
    finally:
        for part, training in found:
            part.training = training


@contextmanager
def buffers_kept(module: LightningModule) -> Iterator[None]:
    """Put this rank's buffers back after the block, whatever ended it."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)


@contextmanager
def _averaging(norms: list[_NormBase]) -> Iterator[None]:
    """From scratch, each batch with the same weight."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
