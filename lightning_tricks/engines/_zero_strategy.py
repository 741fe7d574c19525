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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import Module
from torch.optim import Optimizer

from lightning_tricks.engines._activation_checkpointing import (
    Recomputed,
    checkpoint_blocks,
    refuse_activation_checkpointing,
)
from lightning_tricks.engines._allowed import allow_hyper_parameters
from lightning_tricks.engines._batch_norm import normalise_in_fp32
from lightning_tricks.engines._check import check_before_fit
from lightning_tricks.engines._headline import log_headline
from lightning_tricks.engines._machine import refuse_oversubscription
from lightning_tricks.engines._nvme import no_checkpoint, offload_target, refuse_nvme
from lightning_tricks.engines._precision import BringsPrecision, Mixed
from lightning_tricks.engines._ranks import broadcast_from_rank_zero
from lightning_tricks.engines._saving import save_folder
from lightning_tricks.engines._universal import convert_for_other_ranks, loads_universal, restore_the_rest
from lightning_tricks.engines._zero_agreement import (
    agree_on_batch,
    agree_on_buckets,
    agree_on_offload,
    agree_on_optimizer,
    agree_on_precision,
    agree_on_schedule,
    agree_on_stage,
    agree_with_trainer,
)
from lightning_tricks.engines._zero_config import Config, merged, read_config
from lightning_tricks.engines._zero_file import put_whole, refuse_resuming
from lightning_tricks.engines._zero_manual import ManualWindow
from lightning_tricks.engines._zero_optimizer import (
    configured_optimizer,
    refuse_changed,
    refuse_optimizer,
    refuse_untrainable,
)
from lightning_tricks.engines._zero_saving import save_zero
from lightning_tricks.errors import MisconfigurationError, MissingDependencyError

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
_ALL_AT_ONCE = 10**12  # elements that the optimizer steps at once; Lightning's own
_SWAPPED_AT_ONCE = 10**9  # DeepSpeed's own


class ZeroStrategy(BringsPrecision, DeepSpeedStrategy):
    """ZeRO with the results of one device.

    Beyond Lightning's `DeepSpeedStrategy`: it runs on CPU over gloo; Lightning accumulates gradients, so a loss is
    divided once and windows end with the epoch; buckets scale with the model; a checkpoint folder appears only when it
    is complete, leaves out frozen weights that the module's state dict leaves out, and never brings an old clipping
    threshold back.

    Args:
        stage: what is divided over the ranks: 1 optimizer state, 2 gradients as well, 3 parameters as well. `None`: as
            `config` says, else 2.
        bucket_size: elements (at least 1) reduced or gathered at once; `"auto"` is an eighth of the trained
            parameters, but no less than 2**20 (or all of them) and no more than 2e8.
        activation_checkpointing: `"blocks"` keeps the inputs of the module's repeated blocks only, and computes the
            rest again in the backward pass; class names, or a function that is true of a part, choose other parts.
        offload: `"cpu"` keeps the optimizer state and the fp32 masters in the host's memory, where the optimizer steps;
            at stage 3 the parts of the parameters as well. A folder, at stage 3, swaps both to it; `"nvme"` to the
            folder that the environment variable LIGHTNING_TRICKS_NVME names. `None`: as `config` says.
        precision: `"bf16-mixed"` or `"16-mixed"`; `None` leaves it to `config` and the Trainer.
        config: a DeepSpeed configuration, as a dict or the path of a JSON file, laid over the preset's.

    Raises:
        MissingDependencyError: if DeepSpeed is not installed.
        MisconfigurationError: if an option is out of range, or `config` contradicts one.

    References:
        Rajbhandari et al.: ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (SC 2020).
    """

    strategy_name = "zero"
    runs_check = True

    def __init__(
        self,
        *,
        stage: Literal[1, 2, 3] | None = None,
        bucket_size: int | Literal["auto"] = "auto",
        activation_checkpointing: Recomputed | None = None,
        offload: Literal["cpu", "nvme"] | Path | str | None = None,
        precision: Mixed | None = None,
        config: Config = None,
    ) -> None:
        given = self._given = read_config(config, self.DEEPSPEED_ENV_VAR)
        stage = agree_on_stage(given, stage)
        _refuse_options(stage, bucket_size)
        refuse_activation_checkpointing(activation_checkpointing)
        agree_on_buckets(given, bucket_size)
        self.offload = offload_target(offload)
        kept = self._offload = agree_on_offload(given, stage, self.offload)
        _require_deepspeed()
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is first imported
        super().__init__(
            stage=stage,
            offload_optimizer=kept.optimizer != "none",
            offload_optimizer_device=kept.optimizer,
            offload_parameters=kept.parameters != "none",
            offload_params_device=kept.parameters,
            nvme_path=str(kept.folders[0]) if kept.folders else "",
            pin_memory=torch.cuda.is_available(),
            sub_group_size=_SWAPPED_AT_ONCE if kept.optimizer == "nvme" else _ALL_AT_ONCE,
            logging_level=logging.ERROR,
        )
        self._file: Path | None = None
        self.config = merged(self._config, given.for_deepspeed())
        self._config["zero_optimization"]["stage"] = stage
        self._bring_precision(*agree_on_precision(given, precision))
        self.bucket_size = bucket_size
        self.activation_checkpointing = activation_checkpointing
        self._trained: dict[str, int] = {}
        self._window: ManualWindow | None = None

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

    # -- the configuration -----------------------------------------------------------------------------------------

    def _load_config(self, config: Any) -> None:
        """The user's is read in `__init__`, and laid over Lightning's defaults instead of replacing them."""

    def _init_config_if_needed(self) -> None:
        super()._init_config_if_needed()
        if self.lightning_module is None:
            return  # `Trainer.init_module`: the Trainer's own options come with the module
        trainer = self._required_module.trainer
        if trainer.state.fn == "fit":
            agree_with_trainer(self._given, trainer, str(self.precision_plugin.precision), self.world_size)
            if self._offload.folders and trainer.checkpoint_callbacks:
                raise no_checkpoint(type(trainer.checkpoint_callbacks[0]).__name__)
        if self._given.at("gradient_clipping") is None:
            self._config["gradient_clipping"] = trainer.gradient_clip_val or 0.0

    def _format_config(self) -> None:
        mine: dict[str, Any] = {name: self._config.pop(name) for name in ("bf16", "fp16") if name in self._config}
        super()._format_config()
        self.config = merged(self._config, mine)

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        """Before each backward, whoever asks for it."""
        if not self._required_module.automatic_optimization:
            self._manual_window().before_backward()

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Lightning's step; in manual optimisation it ends the window, after what the closure computes."""
        module = model or self._required_module

        def finished() -> Any:
            result = closure()
            self._manual_window().finish()
            return result

        return super().optimizer_step(
            optimizer, closure if module.automatic_optimization else finished, model=model, **kwargs
        )

    def _manual_window(self) -> ManualWindow:
        window = self._window
        if window is None or window.engine is not self.deepspeed_engine:
            stage = int(self._config["zero_optimization"]["stage"])
            window = self._window = ManualWindow(self.deepspeed_engine, stage, self._lightning_optimizers)
        return window

    def _format_batch_size_and_grad_accum_config(self) -> None:
        self._config["gradient_accumulation_steps"] = 1
        self._config.setdefault("train_micro_batch_size_per_gpu", 1)  # DeepSpeed's own log only; Lightning loads data
        self._config.setdefault("zero_force_ds_cpu_optimizer", False)

    def process_dataloader(self, dataloader: object) -> object:
        """Lightning hands every loader over: the training one is held against the configuration's batch size."""
        trainer = self._required_module.trainer
        if trainer.training:
            agree_on_batch(self._given, trainer, dataloader, self.world_size)
        return super().process_dataloader(dataloader)

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
        refuse_nvme(self._offload.folders, self.global_rank, self.world_size)
        atexit.register(_destroy_dist_connection)  # threads that outlive the interpreter abort the process

    def setup(self, trainer: Trainer) -> None:
        """Check a fit, then hand the module to DeepSpeed."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_before_fit(trainer, self)
        super().setup(trainer)
        log_headline(trainer)

    # -- the engine ------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """After every callback's own, and before the step: ZeRO trains what it divided."""
        if batch_idx == 0:
            refuse_changed(self._required_module, self._trained)
        super().on_train_batch_start(batch, batch_idx)

    def _initialize_deepspeed_train(self, model: Module) -> None:
        self._config.pop("optimizer", None)  # a past fit's: Lightning would ask the module for none
        super()._initialize_deepspeed_train(model)

    def _init_optimizers(self) -> tuple[Any, Any]:
        module, name = self._required_module, type(self._required_module).__name__
        refuse_untrainable(module)
        optimizer, schedule = configured_optimizer(module)
        agree_on_optimizer(self._given, name, optimizer)
        agree_on_schedule(self._given, name, schedule and schedule.scheduler)
        if optimizer is not None:
            refuse_optimizer(module, optimizer, f"zero_{self._config['zero_optimization']['stage']}")
        elif (chosen := self._given.at("optimizer")) is not None:
            self._config["optimizer"] = dict(chosen)
        else:
            raise MisconfigurationError(f"{name}.configure_optimizers returns no optimizer, and ZeRO needs one.")
        return optimizer, schedule

    def _setup_model_and_optimizer(
        self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._trained = {name: id(own) for name, own in model.named_parameters() if own.requires_grad}
        self._size_buckets(trained)
        if self.activation_checkpointing is not None:
            checkpoint_blocks(self._required_module, self.activation_checkpointing)
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
        broadcast_from_rank_zero(model.buffers(), self.root_device)  # DeepSpeed does parameters only
        normalise_in_fp32(model)
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
        names = ("reduce_bucket_size", "allgather_bucket_size")
        free = [name for name in names if self._given.at(f"zero_optimization.{name}") is None]
        self._config["zero_optimization"].update(dict.fromkeys(free, size))
        if self.zero_stage_3 and self._given.at("zero_optimization.prefetch_bucket_size") is None:  # another name of it
            self._config["zero_optimization"].setdefault("stage3_prefetch_bucket_size", size)
        if self._offload.parameters == "nvme" and not self._given.at("zero_optimization.offload_param.buffer_size"):
            largest = max(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
            self._config["zero_optimization"]["offload_param"]["buffer_size"] = -(-largest // self.world_size)

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
        if self._offload.folders:
            raise no_checkpoint("Saving a checkpoint")
        path = Path(self.broadcast(filepath))
        if storage_options is not None:
            raise MisconfigurationError("`storage_options` is for single files; ZeRO writes a folder: leave it out.")
        state = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        options = {"without_frozen": self._frozen_left_out(), "first": self.is_global_zero}
        save_folder(self, path, lambda partial: save_zero(self.deepspeed_engine, partial, state, **options))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint folder, of any number of ranks, or outside a fit a single file: of any engine's weights.

        The clipping threshold stays the one configured now.
        """
        if self._offload.folders:
            raise no_checkpoint("Loading a checkpoint")
        path = Path(self.broadcast(checkpoint_path))
        self._file = path if path.is_file() else None
        if self._file is not None:
            refuse_resuming(self._required_module, path)
            with allow_hyper_parameters():
                return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
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

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put a single file's weights into the module. Those of a folder are there already."""
        if self._file is not None:
            put_whole(self._required_module, checkpoint["state_dict"], self._file, strict)

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
