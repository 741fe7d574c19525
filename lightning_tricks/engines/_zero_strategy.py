"""DeepSpeed's ZeRO as a Lightning strategy, on GPU and on CPU, counting accumulation as one device does."""

import argparse
import atexit
import contextlib
import importlib
import importlib.util
import io
import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch.nn import Module
from torch.optim import Optimizer

from lightning_tricks.engines._activation_checkpointing import checkpoint_blocks, refuse_activation_checkpointing
from lightning_tricks.engines._headline import log_headline
from lightning_tricks.engines._machine import refuse_offload, refuse_oversubscription, save_folder
from lightning_tricks.engines._precision import BringsPrecision, Mixed
from lightning_tricks.engines._universal import convert_for_other_ranks, loads_universal, restore_the_rest
from lightning_tricks.errors import CheckpointError, MisconfigurationError, MissingDependencyError

__all__ = ["ZeroStrategy"]

_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
)
_TRACES = "_lightning_tricks_zero"  # what DeepSpeed put on a module: kept with it, since the next Trainer needs it
_LARGEST_BUCKET = 200_000_000  # elements; Lightning's own
_SMALLEST_BUCKET = 2**20
_BUCKET_UNIT = 256  # DeepSpeed wants a multiple of its alignment


class ZeroStrategy(BringsPrecision, DeepSpeedStrategy):
    """ZeRO with the results of one device.

    Beyond Lightning's `DeepSpeedStrategy`: it runs on CPU over gloo; Lightning accumulates gradients, so a loss is
    divided once and windows end with the epoch; buckets scale with the model; a checkpoint folder appears only when it
    is complete, leaves out frozen weights that the module's state dict leaves out, and never brings an old clipping
    threshold back.

    Args:
        stage: what is divided over the ranks: 1 optimizer state, 2 gradients as well, 3 parameters as well.
        bucket_size: elements (at least 1) reduced or gathered at once; `"auto"` is an eighth of the trained
            parameters, but no less than 2**20 (or all of them) and no more than 2e8.
        activation_checkpointing: `"blocks"` keeps the inputs of the module's repeated blocks only, and computes the
            rest again in the backward pass.
        offload: `"cpu"` keeps the optimizer state and the fp32 masters in the host's memory, where the optimizer steps;
            at stage 3 the parts of the parameters as well.
        precision: `"bf16-mixed"` or `"16-mixed"`; `None` leaves it to the Trainer.

    Raises:
        MissingDependencyError: if DeepSpeed is not installed.
        MisconfigurationError: if an option is out of range.

    References:
        Rajbhandari et al.: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (SC 2020).
    """

    strategy_name = "zero"

    def __init__(
        self,
        *,
        stage: Literal[1, 2, 3] = 2,
        bucket_size: int | Literal["auto"] = "auto",
        activation_checkpointing: Literal["blocks"] | None = None,
        offload: Literal["cpu"] | None = None,
        precision: Mixed | None = None,
    ) -> None:
        _refuse_options(stage, bucket_size)
        refuse_activation_checkpointing(activation_checkpointing)
        refuse_offload(offload)
        _require_deepspeed()
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is first imported
        super().__init__(
            stage=stage,
            offload_optimizer=offload is not None,
            offload_parameters=offload is not None and stage == 3,
            pin_memory=offload is not None and torch.cuda.is_available(),
            logging_level=logging.ERROR,
        )
        self._bring_precision(precision)
        self.bucket_size = bucket_size
        self.activation_checkpointing = activation_checkpointing
        self.offload = offload

    # -- accumulation: Lightning counts, DeepSpeed is told ---------------------------------------------------------

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Never: DeepSpeed would divide the loss a second time and let windows cross the end of an epoch."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this for every micro-batch that is not the last of its window."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def _format_batch_size_and_grad_accum_config(self) -> None:
        super()._format_batch_size_and_grad_accum_config()
        self._config["gradient_accumulation_steps"] = 1
        self._config.setdefault("zero_force_ds_cpu_optimizer", False)

    # -- processes -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Start the process group; on CPU as well, which Lightning's own strategy refuses."""
        refuse_oversubscription(self)
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the process group, and leave it at exit."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            reset_seed()
            self.set_world_ranks()
            _use_cpu()
            with _gloo_only():
                self._init_deepspeed_distributed()
        atexit.register(_destroy_dist_connection)  # threads that outlive the interpreter abort the process

    # -- the engine ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Build the optimizer and DeepSpeed's engine."""
        super().setup(trainer)
        log_headline(trainer)

    def _setup_model_and_optimizer(
        self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise MisconfigurationError(
                f"{type(model).__name__} has no parameter that requires a gradient: ZeRO has nothing to train."
            )
        self._size_buckets(trained)
        if self.activation_checkpointing is not None:
            checkpoint_blocks(self._required_module)
        return self._initialize(
            model, self._config, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler
        )

    def _initialize_deepspeed_inference(self, model: Module) -> None:
        kept = ["fp16", "bf16"] + ["zero_allow_untested_optimizer", "zero_optimization"] * bool(self.zero_stage_3)
        config = {"train_micro_batch_size_per_gpu": 1, **{k: self._config[k] for k in kept if k in self._config}}
        self.model, _ = self._initialize(model, config, model_parameters=[])

    def _initialize(self, model: Module, config: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        import deepspeed

        self._forget_training(model)
        before = _hook_ids(model)
        engine, optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self._device_rank()),
            config=config,
            model=model,
            dist_init_required=False,
            **options,
        )
        added = [(hooks, key) for hooks, key in _hooks(model) if (id(hooks), key) not in before]
        vars(model)[_TRACES] = (weakref.ref(engine), added)
        return engine, optimizer

    def _forget_training(self, model: Module) -> None:
        """Take off what DeepSpeed put on the module, whichever Trainer fitted it, and nobody else's hooks.

        DeepSpeed leaves its hooks behind, and a second fit would run into the first one's. Its engine is ended now and
        not when it happens to be collected: that would take the next engine's masters off the parameters.
        """
        engine, added = vars(model).pop(_TRACES, (lambda: None, ()))
        if (past := engine()) is not None:
            past.destroy()
            past.destroy = lambda: None
        for hooks, key in added:
            hooks.pop(key, None)
        for parameter in model.parameters():
            for name in ("_hp_mapping", "_z3_optimizer"):
                if hasattr(parameter, name):
                    delattr(parameter, name)

    def _size_buckets(self, trained: list[torch.nn.Parameter]) -> None:
        elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
        automatic = min(max(elements // 8, min(elements, _SMALLEST_BUCKET)), _LARGEST_BUCKET)
        size = automatic if self.bucket_size == "auto" else self.bucket_size
        size += -size % _BUCKET_UNIT
        self._config["zero_optimization"].update(reduce_bucket_size=size, allgather_bucket_size=size)
        if self.zero_stage_3:
            self._config["zero_optimization"].setdefault("stage3_prefetch_bucket_size", size)

    def _device_rank(self) -> int:
        return self.local_rank if self.root_device.index is None else self.root_device.index

    @property
    def _required_module(self) -> LightningModule:
        module: LightningModule = self.lightning_module  # type: ignore[assignment]
        return module

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.config  # type: ignore[assignment]
        return config

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder, complete or not there. Called on all ranks."""
        path = Path(self.broadcast(filepath))
        self.exclude_frozen_parameters = self._frozen_left_out()
        write = super().save_checkpoint
        save_folder(self, path, lambda partial: write(checkpoint, partial, storage_options))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder, of any number of ranks. The clipping threshold stays the one configured now."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            raise CheckpointError(
                f"{path} is a single file: ZeRO reads the folders that it wrote. Evaluate it on one device or with"
                " strategy='ddp', or load it with `load_from_checkpoint` before the Trainer takes the module."
            )
        other_ranks = self._was_saved_by_others(path)
        if other_ranks:
            convert_for_other_ranks(self, path)
        optimizer = self.deepspeed_engine.optimizer
        if self.zero_stage_3 and not hasattr(optimizer, "_restore_from_bit16_weights"):
            optimizer._restore_from_bit16_weights = lambda: None  # ZeRO-3 without training: there are no masters
        universal = loads_universal(self.deepspeed_engine) if other_ranks else contextlib.nullcontext()
        with universal, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = super().load_checkpoint(path, weights_only)
        if other_ranks:
            restore_the_rest(self._required_module, path)
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = self.deepspeed_engine.gradient_clipping()
        return state

    def _frozen_left_out(self) -> bool:
        """Whether the module's state dict leaves out all of its frozen parameters, as an adapter's does."""
        module = self._required_module
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        return bool(frozen) and frozen.isdisjoint(module.state_dict())

    def _was_saved_by_others(self, path: Path) -> bool:
        """Whether this run resumes from a checkpoint of another number of ranks."""
        saved = len(list(path.glob("checkpoint/*zero_pp_rank_*_optim_states.pt")))
        return self._required_module.trainer.state.fn == "fit" and saved not in (0, self.world_size)


def _refuse_options(stage: Any, bucket_size: Any) -> None:
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise MisconfigurationError(f"`stage` must be 1, 2 or 3, got {stage!r}. Without ZeRO, use `strategy='ddp'`.")
    whole = isinstance(bucket_size, int) and not isinstance(bucket_size, bool)
    if bucket_size != "auto" and not (whole and bucket_size >= 1):
        raise MisconfigurationError(f"`bucket_size` must be 'auto' or at least 1 element, got {bucket_size!r}.")


def _require_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(
            "ZeRO needs DeepSpeed, which is not installed: pip install 'lightning-tricks[deepspeed]'"
        )


def _use_cpu() -> None:
    """Make DeepSpeed compute on the CPU where the machine has a GPU too."""
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())


@contextmanager
def _gloo_only() -> Iterator[None]:
    """Without DeepSpeed's shared-memory collectives, whose first use compiles C++ and fails without a compiler."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    build = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build


def _hooks(model: Module) -> Iterator[tuple[dict[int, Any], int]]:
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name)
            yield from ((hooks, key) for key in list(hooks))


def _hook_ids(model: Module) -> set[tuple[int, int]]:
    return {(id(hooks), key) for hooks, key in _hooks(model)}
