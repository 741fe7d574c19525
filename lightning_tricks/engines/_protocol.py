"""What a trick may ask of the engine that trains: the one seam between tricks and strategies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_tricks.engines._facts import Memory, Precisions
from lightning_tricks.engines._shards import Shard
from lightning_tricks.engines._snapshot import Snapshot

__all__ = ["Engine"]

T = TypeVar("T")


class Engine(Protocol):
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

    # -- gradients: live, inside `on_before_optimizer_step` ----------------------------------------------------

    def is_optimizer_step(self) -> bool:
        """Whether this `on_before_optimizer_step` precedes a real step, not just another micro-batch. Free."""

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Global 2-norm of this step's gradients: fp32, zero-dimensional, unscaled, the same on every rank.

        Live, inside `on_before_optimizer_step` of a real step. Collective. Computed once a step however many tricks
        ask; it waits for nothing. Not finite when a gradient is not.
        """

    def gradient_norms(self, optimizer: Optimizer, groups: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """The 2-norms of groups of this step's gradients, for logging: fp32, unscaled, the same on every rank.

        A group is a list of parameter names, as `named_parameters()` gives them for the plain module. A parameter
        without a gradient, or one that `optimizer` does not train, counts as zero. After a veto of this step, and
        where a gradient is not finite, a norm is not a number or infinite.

        Live, inside `on_before_optimizer_step` of a real step. Collective, with the same groups on every rank. Costs
        one pass over this rank's gradients and one reduction of a number for each group; computed at every call.
        On the torch engines a preceding `clip_gradient_norm` has scaled the gradients: ask before it.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def clip_gradient_norm(self, optimizer: Optimizer, limit: float | Tensor) -> None:
        """Scale this step's gradients by `min(1, limit / norm)`; leave them alone if the norm is not finite.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. Collective.
        """

    def clip_gradient_value(self, optimizer: Optimizer, limit: float, names: Sequence[str] | None = None) -> Tensor:
        """Bring each element of this step's gradients into `[-limit, limit]`; an infinite one too, but not NaN.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. Collective. Costs two
        passes over this rank's gradients and, on sharded engines, one reduction of a number; waits for nothing. Under
        ZeRO the step itself clips, when it has its fp32 gradients; one whose norm is not finite it drops.

        Args:
            optimizer: whose step follows.
            limit: the largest absolute value allowed, above 0.
            names: the parameters, as `named_parameters()` gives them for the plain module; None: all.

        Returns:
            Whether an element was outside, on any rank: 1 or 0, fp32, zero-dimensional, the same on every rank.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def clip_gradient_units(
        self, optimizer: Optimizer, ratio: float, floor: float, names: Sequence[str] | None = None
    ) -> Tensor:
        """Scale each unit's gradient to `ratio * max(norm of its weights, floor)`, if its norm is above that.

        A unit is an index of a weight's first dimension; a vector or a number is one. Weights are the masters. A unit
        whose gradient or weights are not finite stays as it is.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. Collective. Costs a
        pass over this rank's weights and two over its gradients and, on sharded engines, one reduction of two numbers
        for each unit; waits for nothing. Under ZeRO the step itself clips, when it has its fp32 gradients.

        Args:
            optimizer: whose step follows.
            ratio: of the norms, above 0.
            floor: what the norm of a unit's weights counts as at least, above 0.
            names: the parameters, as `named_parameters()` gives them for the plain module; None: all.

        Returns:
            The share of units that were scaled: fp32, zero-dimensional, the same on every rank.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def scale_gradient_groups(
        self, optimizer: Optimizer, factors: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]
    ) -> None:
        """Multiply the gradients of groups of parameters, each by its factor.

        Live, inside `on_before_optimizer_step` of a real step, after `claim_gradient_clipping`. On every rank, with the
        same factors. Costs one pass over this rank's gradients; waits for nothing. Under ZeRO the step itself does it,
        when it has its fp32 gradients. A norm that is asked for later in this step is that before.

        Args:
            optimizer: whose step follows. Parameters of another one stay as they are.
            factors: a zero-dimensional tensor for each group that is to change.
            groups: a list of parameter names for each group, as in `gradient_norms`.

        Raises:
            MisconfigurationError: if a name is no parameter of the module.
        """

    def scale_gradients(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply this step's gradients by `factor`, on all ranks alike. Norms and clipping go by the product.

        For what is known only once a window is complete, such as how many tokens it held. Twice in a step multiplies.

        Live, inside `on_before_optimizer_step` of a real step, before anything is clipped in it. Collective: the same
        factor on every rank. Costs one pass over this rank's gradients, which ZeRO does in
        fp32 within its step.

        Raises:
            MisconfigurationError: if `factor` is not a finite number above 0.
        """

    def leave_out(self, optimizer: Optimizer, names: Sequence[str]) -> None:
        """Leave parameters out of this step: weights, moments and step counts stay, and no norm holds their gradients.

        So weight decay does not move them either, and an optimizer's bias correction begins with their first step. An
        optimizer must leave parameters without a gradient alone, as all of torch's do. Twice in a step adds up.

        Live, inside `on_before_optimizer_step` of a real step, before anyone asks for a norm in it. On every rank, with
        the same names. Communicates nothing. Costs a walk over the names; under ZeRO a pass over their gradients.

        Args:
            optimizer: whose step follows. Parameters of another one stay as they are.
            names: the parameters, as `named_parameters()` gives them for the plain module.

        Raises:
            MisconfigurationError: if a name is no parameter of the module, a norm has been given in this step, or,
                under ZeRO, the names are a part of what is stepped in one piece: a parameter group.
        """

    def awaits_gradients(self) -> bool:
        """Whether a parameter that required a gradient when the fit was set up must require one in each backward pass.

        Where it need not, as on one device, a trick can spare the computation of gradients that it would `leave_out`.

        Live. Free.
        """

    def veto_step(self, optimizer: Optimizer) -> None:
        """Drop this optimizer step: weights, moments and step counts stay as if it had not been, bit for bit.

        The whole accumulation window is dropped and the next one starts clean. The loss scale of fp16 and its count of
        good steps stay too, unless the scaler itself found a gradient that is not finite: then it backs off.
        `trainer.global_step` advances, and so does a learning-rate schedule that Lightning steps: neither is the
        engine's. An optimizer must leave parameters without a gradient alone, as all of torch's do.

        Live, inside `on_before_optimizer_step` of a real step. Collective: on all ranks or on none, so decide by a
        value that is the same on all, as `gradient_norm` is. Costs that norm, if nobody asked for it, and nothing
        else; under fp16 on the torch engines it waits for the loss scale.
        """

    def was_step_applied(self) -> bool:
        """Whether the last optimizer step changed the weights: not if it was vetoed, nor if a loss scaler skipped it.

        Live, after a real step, in `on_train_batch_end` or later; the same on every rank. Free. Where Lightning
        accumulates, a micro-batch leaves the answer of the step before. False before the first step. The engine
        must exist before the step: get it in `setup()`.
        """

    def scales_loss(self) -> bool:
        """Whether fp16 scales the loss, so that a step whose scaled gradients overflow is dropped by the engine itself.

        Live. Free. Such a step has a `gradient_norm` that is not finite, and says nothing about its batch.
        """

    def unscaled_loss(self, loss: Tensor) -> Tensor:
        """The loss that `on_before_backward` is given, without the scale of fp16.

        Live, in `on_before_backward`, on any rank. Nothing waits for the device. Lightning's scaler multiplies the loss
        before that hook, DeepSpeed's after it.
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
