"""What all engines share about ranks and weights: who they are, weights to a file and back, a rank's part of them."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_tricks.engines._capabilities import refusal
from lightning_tricks.engines._checkpoint_values import add_part, add_whole, cut, stored
from lightning_tricks.engines._ranks import sum_over_ranks
from lightning_tricks.engines._saving import stream_on_rank_zero, write_on_rank_zero
from lightning_tricks.engines._shard_files import named_wholes, rounded
from lightning_tricks.engines._shards import Shard, misfit
from lightning_tricks.errors import CheckpointError, MisconfigurationError
from lightning_tricks.storage import WeightsFile

__all__ = ["Entry", "WeightsEngine"]

T = TypeVar("T")
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_COMPILED = "_orig_mod."


class Entry(NamedTuple):
    """One entry of a checkpoint: its plain name, and the module's own parameter or buffer."""

    name: str
    tensor: Tensor


class WeightsEngine:
    """The part of the `Engine` protocol about ranks and weights that does not depend on how parameters are laid out.

    A subclass says how one tensor is read whole (`_layout`, `_whole`), which part of it this rank holds (`_part`), and
    how both are written (`_write`, `_put`, `_publish`).

    Args:
        trainer: the Trainer; held weakly, so that an engine never keeps a model alive.
        name: the engine's name.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._reference = weakref.ref(trainer)
        self._name = name

    # -- who we are --------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The engine's name."""
        return self._name

    @property
    def rank(self) -> int:
        """This process's rank."""
        return int(self._trainer.global_rank)

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return int(self._trainer.world_size)

    @property
    def _trainer(self) -> Trainer:
        trainer = self._reference()
        if trainer is None:
            raise MisconfigurationError("The Trainer of this engine is gone: call `engine_of(trainer)` again.")
        return trainer

    @property
    def _module(self) -> LightningModule:
        return self._trainer.lightning_module

    @property
    def _device(self) -> torch.device:
        return self._trainer.strategy.root_device

    # -- weights -----------------------------------------------------------------------------------------------

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The entries of a checkpoint, whole, one at a time, on the CPU."""
        for entry in self._entries():
            yield entry.name, self._whole(entry.tensor).detach().to("cpu", copy=True)

    def save_weights(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Stream the weights into one file, written by rank 0."""
        layout = {entry.name: self._layout(entry.tensor) for entry in self._entries()}
        stream_on_rank_zero(path, layout, self.named_full_weights(), metadata)

    def write_on_rank_zero(self, path: Path, write: Callable[[], object]) -> None:
        """Let rank 0 write a file, while the others wait. A failure there is raised on every rank."""
        write_on_rank_zero(path, write)

    def load_weights(self, path: Path) -> None:
        """Put the weights of a file written by `save_weights` back."""
        file, entries = WeightsFile(path), self._entries()
        self._refuse_mismatch(file, entries)
        self._before_writing()
        with torch.no_grad():
            for entry in entries:
                self._write(entry, file)
            self._publish()
        self.barrier()

    def named_shards(self) -> Iterator[Shard]:
        """This rank's parts of the trained parameters' masters."""
        for entry in self._trained():
            part = self._part(entry)
            if part is not None and part[0].numel():
                yield Shard(entry.name, part[0], part[1], self._layout(entry.tensor)[1])

    def put_shards(self, values: Mapping[str, Tensor]) -> None:
        """Write this rank's parts back, and let the model compute with them."""
        self._refuse_misfit("put", misfit(self.named_shards(), values))
        self._before_writing()
        with torch.no_grad():
            for entry in self._trained():
                if entry.name in values:
                    self._put(entry, values[entry.name].detach())
            self._publish()

    def put_shards_alone(self, values: Mapping[str, Tensor]) -> bool:
        """Write this rank's parts back, and ask no other rank."""
        if not self._publishes_alone():
            return False
        self._leave_forward()
        self._before_writing()
        with torch.no_grad():
            for entry in self._trained():
                if entry.name in values:
                    self._put(entry, values[entry.name].detach())
            self._publish()
        return True

    def save_shards(self, path: Path, values: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Gather one tensor after the other and stream it into one file, written by rank 0."""
        shards = list(self.named_shards())
        self._refuse_misfit("save", misfit(shards, values) or rounded(values))
        shapes = {entry.name: self._layout(entry.tensor)[1] for entry in self._trained()}
        layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
        stream_on_rank_zero(path, layout, named_wholes(shards, values, shapes, self._device), metadata)

    def load_shards(self, path: Path) -> dict[str, Tensor]:
        """Read this rank's parts from a file of `save_shards`."""
        file = WeightsFile(path)
        self._refuse_mismatch(file, self._trained())
        return {
            shard.name: file.elements(shard.name, shard.start, shard.stop).to(shard.values.device)
            for shard in self.named_shards()
        }

    def keep_in_checkpoint(self, checkpoint: dict[str, Any], name: str, values: Mapping[str, Tensor]) -> None:
        """Put values kept beside the shards into a checkpoint that is being written."""
        if getattr(self._trainer.strategy, "writes_parts", False):
            add_part(checkpoint, name, lambda path: self.save_shards(path, values))
            return
        shards = list(self.named_shards())
        self._refuse_misfit("save", misfit(shards, values) or rounded(values))
        shapes = {entry.name: self._layout(entry.tensor)[1] for entry in self._trained()}
        wholes = named_wholes(shards, values, shapes, self._device)
        # Where each rank writes a file of its own and reads that back, each holds them.
        kept = {own: whole for own, whole in wholes if self.rank == 0 or self.name.startswith("zero")}
        add_whole(checkpoint, name, kept)

    def find_in_checkpoint(self, checkpoint: Mapping[str, Any], name: str) -> Callable[[], dict[str, Tensor]] | None:
        """What reads this rank's parts of values that `keep_in_checkpoint` kept."""
        found = stored(checkpoint, name)
        if found is None:
            return None
        if isinstance(found, str):
            path = Path(str(self._trainer.ckpt_path)) / found
            return lambda: self.load_shards(path)
        wholes = found
        return lambda: cut(wholes, self.named_shards(), [entry.name for entry in self._trained()])

    def training_forward(self, batch: Any, batch_idx: int) -> None:
        """The module's training step on a batch, for what its layers note of it."""
        trainer = self._trainer
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            arguments = (batch, batch_idx) if _takes_index(self._module) else (batch,)
            self._call_training_step(*arguments)

    def _call_training_step(self, *arguments: Any) -> None:
        """Through the strategy, which gathers what is sharded."""
        self._trainer.strategy.training_step(*arguments)

    def _refuse_misfit(self, verb: str, problem: str | None) -> None:
        """Raise on every rank if there is a problem on any."""
        if self.sum_over_ranks(torch.tensor(float(problem is not None))) > 0:
            raise MisconfigurationError(
                f"The shards to {verb} do not fit: {problem or 'those of another rank'}. Give what `named_shards()`"
                " gives on this very rank, under the same names."
            )

    def _trained(self) -> list[Entry]:
        """The parameters in training, each once, under plain names."""
        named = [(self._plain_name(name), parameter) for name, parameter in self._module.named_parameters()]
        return [Entry(name, parameter) for name, parameter in named if parameter.requires_grad]

    def _entries(self) -> list[Entry]:
        """The module's state dict as references to its own tensors, under plain names."""
        keys = [self._plain_name(key) for key in self._state_keys()]
        own: dict[str, Tensor] = dict(self._module.named_buffers(remove_duplicate=False))
        own = {self._plain_name(name): tensor for name, tensor in own.items()}
        own.update(self._named_parameters())
        for key in keys:
            if key not in own:
                raise refusal("state", engine=self.name, name=key)
        return [Entry(key, own[key]) for key in keys]

    def _state_keys(self) -> list[str]:
        return list(self._module.state_dict())

    def _refuse_mismatch(self, file: WeightsFile, entries: list[Entry]) -> None:
        expected = {entry.name: self._layout(entry.tensor)[1] for entry in entries}
        for name in [*expected, *file.names]:
            present = file.layout[name][1] if name in file.layout else None
            if present != expected.get(name):
                raise CheckpointError(
                    f"{file.path} does not fit {type(self._module).__name__}: `{name}` is {_describe(present)} in the"
                    f" file and {_describe(expected.get(name))} in the module. Load a file of this very model."
                )

    # -- ranks -------------------------------------------------------------------------------------------------

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks."""
        return sum_over_ranks(tensor, self._device)

    def broadcast(self, value: T, source: int = 0) -> T:
        """The `value` of rank `source`, on every rank."""
        return self._trainer.strategy.broadcast(value, source)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._trainer.strategy.barrier()

    # -- what a subclass says ----------------------------------------------------------------------------------

    def _plain_name(self, name: str) -> str:
        """A name as the plain module has it."""
        return name.replace(_COMPILED, "")

    def _layout(self, tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape that `_whole` will give, without communicating."""
        return tensor.dtype, tuple(tensor.shape)

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def _write(self, entry: Entry, file: WeightsFile) -> None:
        entry.tensor.copy_(file.tensor(entry.name))

    def _part(self, entry: Entry) -> tuple[Tensor, int] | None:
        """This rank's stretch of the flattened master and where it begins; None if it holds nothing of it."""
        return entry.tensor.detach().reshape(-1), 0

    def _put(self, entry: Entry, values: Tensor) -> None:
        entry.tensor.copy_(values.reshape(entry.tensor.shape))

    def _publishes_alone(self) -> bool:
        """Whether `_publish` asks no other rank."""
        return True

    def _leave_forward(self) -> None:
        """Forget a forward pass that an exception ended."""

    def _before_writing(self) -> None:
        """Drop whole copies that would stay as they were."""

    def _publish(self) -> None:
        """Bring low-precision and gathered copies up to date after `_write`."""

    def _named_parameters(self) -> dict[str, Tensor]:
        parameters = self._module.named_parameters(remove_duplicate=False)
        return {self._plain_name(name): parameter for name, parameter in parameters}


def _takes_index(module: LightningModule) -> bool:
    return "batch_idx" in inspect.signature(module.training_step).parameters or (
        len(inspect.signature(module.training_step).parameters) > 1
    )


def _describe(shape: Any) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
