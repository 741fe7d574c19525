"""What a trick may ask of the engine that trains: the one seam between tricks and strategies."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lightning_tricks.engines._facts import Memory, Precisions
from lightning_tricks.engines._protocol_steps import StepEngine
from lightning_tricks.engines._shards import Shard
from lightning_tricks.engines._snapshot import Snapshot

__all__ = ["Engine"]

T = TypeVar("T")


class Engine(StepEngine, Protocol):
    """The engine behind a Trainer, as tricks see it. Get it with `engine_of(trainer)`.

    Methods come in two phases. *Configure* methods are called from a callback's `setup()`, before the strategy
    has wrapped the model. *Live* methods are called once training runs. A method marked *collective* must be
    called on every rank, in the same order. What an engine cannot do exactly raises `UnsupportedError`.
    """

    @property
    def name(self) -> str:
        """The engine's name: `one_device`, `ddp`, `fsdp2`, `fsdp1`, `zero_1`, `zero_2` or `zero_3`."""

    @property
    def rank(self) -> int:
        """This process's rank among all. Any phase; free."""

    @property
    def world_size(self) -> int:
        """The number of data-parallel processes. Any phase; free."""

    # -- configure ---------------------------------------------------------------------------------------------

    def claim_gradient_clipping(self, trick: str) -> None:
        """Reserve norm clipping for `trick`. Configure phase; free.

        Raises:
            MisconfigurationError: if the Trainer, the engine's own configuration or another trick clips as well;
                the message names both.
        """

    # -- weights: live, between steps --------------------------------------------------------------------------

    def named_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The entries that a checkpoint of the module holds, whole, one at a time, on the CPU.

        Parameters come at the precision of the master weights (fp32), buffers as they are; names are the plain
        module's, compiled or not. Live. Collective: exhaust it on every rank. Memory: one tensor at a time.
        """

    def save_weights(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Stream `named_full_weights()` into one safetensors file, written by rank 0. Live. Collective.

        The file appears under `path` only when it is complete.

        Raises:
            CheckpointError: on every rank, if it cannot be written; an older file under `path` stays as it was.
        """

    def write_on_rank_zero(self, path: Path, write: Callable[[], object]) -> None:
        """Let rank 0 write a file by calling `write`, while the others wait. Live. Collective.

        Raises:
            CheckpointError: on every rank, if the disk refuses it. What else `write` raises, rank 0 raises.
        """

    def load_weights(self, path: Path) -> None:
        """Put the weights of a file written by `save_weights` back: parameters, master copies, buffers.

        Live. Collective. Bit-exact after `save_weights`. Each rank reads only what it holds.

        Raises:
            CheckpointError: if a name is missing or too many, or a shape differs; the first one is named.
        """

    def named_shards(self) -> Iterator[Shard]:
        """This rank's parts of the trained parameters' master weights, each with its place in the flattened whole.

        Masters are fp32 wherever the engine has them so; under bf16-true the torch engines train bf16 itself. Under
        one device and DDP a rank holds every parameter whole; elsewhere the ranks' parts make up the whole without
        overlap, once for each copy that `fsdp2(replicate=...)` keeps, and a parameter of which this rank holds nothing
        is left out. Tied parameters come once.

        Live, between steps. Communicates nothing. Memory: nothing, or one part where the optimizer is offloaded.
        """

    def put_shards(self, values: Mapping[str, Tensor]) -> None:
        """Write the master weights of this rank's parts, and let the model compute with them. Bit-exact.

        Swapping weights in and out: `raw = {s.name: s.values.clone() for s in engine.named_shards()}`, then
        `put_shards(averaged)`, and later `put_shards(raw)`. Moments stay as they are.

        Live, between steps. Collective. Costs a copy, and under ZeRO what a step does to hand out new weights: one
        gathering of the low-precision copies.

        Args:
            values: for each name that `named_shards()` gives on this rank, as many elements, of any shape and device.

        Raises:
            MisconfigurationError: on every rank, if on some rank a name is missing or unknown, or a size differs.
        """

    def put_shards_alone(self, values: Mapping[str, Tensor]) -> bool:
        """As `put_shards`, after an exception: this rank asks no other one, which may be waiting elsewhere.

        Live. Communicates nothing. Costs a copy.

        Returns:
            Whether the values were written: not under ZeRO with several ranks, whose copies are gathered together.
        """

    def save_shards(self, path: Path, values: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write values kept beside `named_shards()`, such as averages, into one file that any number of ranks can load.

        Lightning saves the callback state of rank 0 only, and a rank's part depends on the number of ranks: so keep
        such values in a file beside the checkpoint, and its name in the callback's state. The file appears under
        `path` only when it is complete: write it before the checkpoint that names it.

        Live, between steps. Collective. Costs one sum over the ranks of each tensor (none on one device and DDP), and
        the memory of one whole tensor on each rank.

        Args:
            path: the safetensors file; rank 0 writes it.
            values: for each name that `named_shards()` gives on this rank, as many elements, of at most fp32.
            metadata: strings to store in the file's header.

        Raises:
            MisconfigurationError: on every rank, if on some rank a name is missing or unknown, or a size differs, or a
                dtype has no place in fp32.
        """

    def load_shards(self, path: Path) -> dict[str, Tensor]:
        """This rank's parts of what `save_shards` wrote, on whatever engine and number of ranks: fp32, flat, bit-exact.

        Live, between steps. Communicates nothing; each rank reads only what it holds.

        Raises:
            CheckpointError: if the file is absent or truncated, a name is missing or too many, or a shape differs.
        """

    def capture_state(self) -> Snapshot:
        """A copy of what training changes on this rank: masters, moments, step counts, rates, buffers.

        Left out are learning-rate schedules and the loss scale, which are not the engine's, and random numbers. It is
        for this very fit: a checkpoint is what other processes can load.

        Live, between steps. Communicates nothing. Memory: as much as the weights and the optimizer's state.
        """

    def restore_state(self, state: Snapshot) -> None:
        """Go back to a state that `capture_state` gave in this fit, bit for bit.

        Live, between steps. Collective. Costs a copy, and under ZeRO what a step does to hand out new weights.
        """

    def keep_in_checkpoint(self, checkpoint: dict[str, Any], name: str, values: Mapping[str, Tensor]) -> None:
        """Let a checkpoint that is being written hold values kept beside `named_shards()`, and follow it anywhere.

        A checkpoint that is one file holds them in it; one of `fsdp2` or ZeRO as one more file in its folder, written
        before the folder gets its name. So it is complete or not there, and moves and goes with the checkpoint.

        Live, in a callback's `on_save_checkpoint`. Collective. Costs what `save_shards` does; where the checkpoint is
        one file, rank 0 holds the whole values on the CPU until it is written. Under Lightning's own strategies that
        shard, rank 0 holds them too, and under its DeepSpeedStrategy every rank.

        Args:
            checkpoint: what the hook was given.
            name: tells several such values apart.
            values: for each name that `named_shards()` gives on this rank, as many elements, of at most fp32. They
                must stay as they are until the checkpoint is written.

        Raises:
            MisconfigurationError: on every rank, as `save_shards`.
        """

    def find_in_checkpoint(self, checkpoint: Mapping[str, Any], name: str) -> Callable[[], dict[str, Tensor]] | None:
        """How to read this rank's parts of values that `keep_in_checkpoint` kept, on any number of ranks.

        In a callback's `on_load_checkpoint`, free: None if there are none. Call what comes back once the engine is
        live: fp32, flat, bit-exact; it communicates nothing, and raises CheckpointError as `load_shards` does.

        Args:
            checkpoint: what the hook was given.
            name: as they were kept.
        """

    def training_forward(self, batch: Any, batch_idx: int) -> None:
        """Run the module's `training_step` on a batch, without a gradient, for what its layers note of the batch.

        Live, between steps, under automatic optimisation. Collective on sharded engines, which gather parameters for
        it. DDP is passed by: each rank's buffers are its own. Whatever else the step does, such as logging and drawing
        random numbers, it does.

        Args:
            batch: on this rank's device.
            batch_idx: its number.
        """

    # -- ranks: live -------------------------------------------------------------------------------------------

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks, as a new tensor without gradient. Collective."""

    def broadcast(self, value: T, source: int = 0) -> T:
        """The `value` (picklable) that rank `source` holds, on every rank. Collective."""

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""

    # -- what it is: live --------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        """What this rank has allocated for the training state, by what it is for, read from the tensors that exist.

        Each storage counts once and as a whole, padding included. What does not exist yet is `None`: gradients before
        the first backward and wherever the engine has freed them, the optimizer's state before its first step. Ask in
        `on_before_optimizer_step` for gradients. Left out is what a step needs and frees: activations, and gradients
        on their way.

        Live, in `on_fit_start` or later, and outside forward and backward; after `fit`, what is left. Communicates
        nothing. Costs a walk over the engine's tensors.

        Raises:
            MisconfigurationError: if the engine is not set up yet.
        """

    def precision(self) -> Precisions:
        """The dtypes in force: of parameters, masters, the forward pass and the reduction; and what a batch undergoes.

        Read from the tensors and from what the engine was built with, not from the options asked for. Phase and cost as
        `memory`.

        Raises:
            MisconfigurationError: if the engine is not set up yet.
        """
