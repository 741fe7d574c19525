"""FSDP2 as a Lightning strategy that shards a plain LightningModule by itself."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_tricks.engines._activation_checkpointing import (
    Recomputed,
    checkpoint_blocks,
    checkpoints,
    refuse_activation_checkpointing,
)
from lightning_tricks.engines._allowed import allow_hyper_parameters
from lightning_tricks.engines._batch_norm import normalisations_with_statistics
from lightning_tricks.engines._blocks import find_blocks
from lightning_tricks.engines._check import check_before_fit
from lightning_tricks.engines._checkpoint_values import parts_of, write_parts
from lightning_tricks.engines._fsdp2_names import asking_for_its_weights, refuse_other_names
from lightning_tricks.engines._fsdp2_states import asked_for_its_moments, refuse_half_a_state
from lightning_tricks.engines._headline import log_headline
from lightning_tricks.engines._machine import refuse_offload, refuse_oversubscription
from lightning_tricks.engines._materialise import materialise, refuse_without_values
from lightning_tricks.engines._optimizers import refuse_closures
from lightning_tricks.engines._precision import BringsPrecision, Mixed
from lightning_tricks.engines._ranks import broadcast_from_rank_zero
from lightning_tricks.engines._replicas import Replicas, count_replicas, refuse_replicas, sharding_mesh
from lightning_tricks.engines._saving import save_folder
from lightning_tricks.engines._zero_optimizer import refuse_untrainable
from lightning_tricks.errors import CheckpointError, MisconfigurationError

__all__ = ["FSDP2Strategy"]

# The modules sharded here: where their shards lie, and how many copies of each there are.
_SHARDED: "WeakKeyDictionary[nn.Module, tuple[str | None, int]]" = WeakKeyDictionary()


class FSDP2Strategy(BringsPrecision, ModelParallelStrategy):
    """Fully sharded data parallelism, version 2, for an unchanged LightningModule.

    Each repeated block is sharded on its own, and the rest with the module. Weights are broadcast from rank 0 first.
    What is on the meta device gets its values layer by layer once it is sharded, by `reset_parameters()`, so that no
    rank holds the whole model: build it in `configure_model`, or under `torch.device("meta")`.
    A module that shards itself in `configure_model` is left as it is. The step hooks run through the module's own call,
    so that its parameters are whole there. A checkpoint folder appears only when it is complete.

    Args:
        shard: class names of the blocks to shard. Empty: those that a Hugging Face model names in
            `_no_split_modules`, else the items of any `ModuleList` whose class occurs in it at least twice.
        replicate: the number of copies of the model, each sharded over as many ranks that follow one another;
            `"nodes"`: a copy on each machine. 1 shards over all ranks.
        activation_checkpointing: `"blocks"` keeps the inputs of those blocks only, and computes the rest again in the
            backward pass; class names, or a function that is true of a part, choose other parts.
        offload: `"cpu"` keeps the shards of parameters, gradients and optimizer state in the host's memory, where the
            optimizer steps; a block's parameters visit the device.
        precision: `"bf16-mixed"` or `"16-mixed"`; `None` leaves it to the Trainer.

    Raises:
        MisconfigurationError: if an option is out of range, `shard` names a class that the module does not contain, or
            `replicate` does not divide the ranks.

    References:
        Zhao et al.: PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (VLDB 2023).
    """

    runs_check = True
    writes_parts = True

    def __init__(
        self,
        *,
        shard: Sequence[str] = (),
        replicate: Replicas = 1,
        activation_checkpointing: Recomputed | None = None,
        offload: Literal["cpu"] | None = None,
        precision: Mixed | None = None,
    ) -> None:
        if isinstance(shard, str):
            raise MisconfigurationError(f"`shard` must be a list of class names, got {shard!r}: write [{shard!r}].")
        refuse_replicas(replicate)
        refuse_activation_checkpointing(activation_checkpointing)
        refuse_offload(offload)
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1)
        self._bring_precision(precision)
        self.shard = tuple(shard)
        self.replicate = replicate
        self.activation_checkpointing = activation_checkpointing
        self.offload = offload

    # -- processes -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Start the process group with all processes in one data-parallel dimension: all train on different batches."""
        refuse_oversubscription(self)
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._replicas = count_replicas(self.replicate, self.num_nodes, self._data_parallel_size)
        if self.offload is not None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # whole weights and norms are gathered on the host
        super().setup_environment()

    # -- the module ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, then build the optimizers on its shards."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            refuse_untrainable(self.model)  # type: ignore[arg-type]
            check_before_fit(trainer, self)
        self.accelerator.setup(trainer)  # type: ignore[union-attr]
        self.model = self.precision_plugin.convert_module(self.model)  # type: ignore[arg-type]
        self._shard(self.model, self.activation_checkpointing if fitting else None)
        self._materialise(self.model)
        if self.offload is None:  # else `fully_shard` has put everything in its place
            self.model_to_device()
        self.barrier()
        if fitting:
            self.setup_optimizers(trainer)
            refuse_closures(self.optimizers, "FSDP2")
        self.setup_precision_plugin()
        if fitting and self.offload is None:
            _optimizers_to_device(self.optimizers, self.root_device)
        log_headline(trainer)

    def _shard(self, module: nn.Module, recomputed: Recomputed | None) -> None:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if any(isinstance(part, FSDPModule) for part in module.modules()):
            self._refuse_late_options(module, recomputed)
            return
        if recomputed is not None:  # before the sharding: a block computed again gathers its parameters again
            checkpoint_blocks(module, recomputed, self.shard)
        blocks = find_blocks(module, self.shard)
        refuse_without_values(module)
        # `fully_shard` keeps each rank's own values, one shard from each: they must come from one initialisation.
        broadcast_from_rank_zero([*module.parameters(), *module.buffers()], self.root_device)
        dtypes = _dtypes(str(self.precision_plugin.precision))
        mesh = sharding_mesh(self.device_mesh["data_parallel"], self._replicas)
        common = {"mesh": mesh, "offload_policy": self._offload_policy()}
        norms = normalisations_with_statistics(module) if dtypes else []
        for norm in norms:
            fully_shard(norm, **common, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for block in (block for block in blocks if block not in norms):
            fully_shard(block, **common, mp_policy=MixedPrecisionPolicy(**dtypes))
        # The module's own inputs are batches: targets and all are left as they are.
        policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
        fully_shard(module, **common, mp_policy=policy, reshard_after_forward=False)
        _SHARDED[module] = (self.offload, self._replicas)

    def _materialise(self, module: nn.Module) -> None:
        """Lightning's way lets each rank draw for its own shards, so that equal seeds draw equal rows on all ranks."""
        if module in _SHARDED:
            shards_on = self.root_device if self.offload is None else torch.device("cpu")
            materialise(module, self.root_device, shards_on)
        else:  # it shards itself, which makes its first values its own business
            _materialize_distributed_module(module, self.root_device)

    def _refuse_late_options(self, module: nn.Module, recomputed: Recomputed | None) -> None:
        known = recomputed is None or checkpoints(module, recomputed)
        late = [] if known else [f"activation_checkpointing={getattr(recomputed, '__name__', recomputed)!r}"]
        offload, replicas = _SHARDED.get(module, (None, 1))
        late += [f"offload={self.offload!r}"] if offload != self.offload else []
        late += [f"replicate={self._replicas}"] if replicas != self._replicas else []
        if late:
            raise MisconfigurationError(
                f"{type(module).__name__} is sharded already, by itself or by an earlier fit: `{late[0]}` comes too"
                " late. Choose it where the module is sharded first."
            )

    def _offload_policy(self) -> Any:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

        on_gpu = self.root_device.type == "cuda"
        return OffloadPolicy() if self.offload is None else CPUOffloadPolicy(pin_memory=on_gpu)

    # -- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's step, through the module's call, where FSDP2 gathers the parameters."""
        with self.precision_plugin.train_step_context():
            return self._redirect("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `training_step`, without a backward."""
        return self._evaluate(self.precision_plugin.val_step_context(), "validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `training_step`, without a backward."""
        return self._evaluate(self.precision_plugin.test_step_context(), "test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `training_step`, without a backward."""
        return self._evaluate(self.precision_plugin.predict_step_context(), "predict_step", *args, **kwargs)

    def _evaluate(self, context: AbstractContextManager[Any], name: str, *args: Any, **kwargs: Any) -> Any:
        with context:
            output = self._redirect(name, *args, **kwargs)
        self._reshard()  # no backward will: parameters must be shards again for whoever reads them
        return output

    def _redirect(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.lightning_module
        return self._forward_redirection(module, module, name, *args, **kwargs)

    def _reshard(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for part in self.lightning_module.modules():  # type: ignore[union-attr]
            if isinstance(part, FSDPModule):
                part.reshard()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder, complete or not there. Called on all ranks."""
        path, parts = Path(self.broadcast(filepath)), parts_of(checkpoint)

        def write(partial: Path) -> None:
            write_parts(parts, partial)
            self._write(checkpoint, partial, storage_options)

        save_folder(self, path, write)

    def _write(self, checkpoint: dict[str, Any], partial: Path, storage_options: Any) -> None:
        """Each rank raises its own failure; torch tells every rank of each, in an exception of its own."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except CheckpointException as error:
            if self.global_rank in error.failures:
                raise error.failures[self.global_rank][0] from error

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder, or a single file: of one device, DDP or an ensemble."""
        path = Path(self.broadcast(checkpoint_path))
        kept = self.optimizers
        if self._required_module.trainer.state.fn != TrainerFn.FITTING:
            self.optimizers = []  # a past fit's: an evaluation reads weights alone
        try:
            with allow_hyper_parameters():
                if path.is_file():
                    return self._load_file(path, weights_only)
                module = self._required_module
                states = asked_for_its_moments(module, path) if self.optimizers else nullcontext()
                with asking_for_its_weights(module, path), states:
                    return super().load_checkpoint(path, weights_only)
        finally:
            self.optimizers = kept

    @property
    def _required_module(self) -> LightningModule:
        module: LightningModule = self.lightning_module  # type: ignore[assignment]
        return module

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        module = self._required_module
        strict = module.strict_loading
        self._refuse_file(path, strict, weights_only)
        # Lightning is strict about every parameter, also those that the module's state dict leaves out.
        module.strict_loading = False
        try:
            return super().load_checkpoint(path, weights_only)
        finally:
            module.strict_loading = strict

    def _refuse_file(self, path: Path, strict: bool, weights_only: bool | None) -> None:
        module = self._required_module
        if module.trainer.state.fn == TrainerFn.FITTING and not all(p.requires_grad for p in module.parameters()):
            raise CheckpointError(
                f"{path} is a single file, whose optimizer state counts trained parameters only: FSDP2 cannot resume"
                " from it beside frozen ones. Resume on one device, or from a folder that FSDP2 wrote."
            )
        checkpoint = torch.load(path, map_location="meta", weights_only=weights_only)
        if module.trainer.state.fn == TrainerFn.FITTING:
            refuse_half_a_state(checkpoint, path)
        if strict:
            refuse_other_names(module, path, set(checkpoint["state_dict"]))


def _dtypes(precision: str) -> dict[str, Any]:
    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return {} if low is None else {"param_dtype": low, "reduce_dtype": torch.float32}
