"""DeepSpeed's ZeRO as a Lightning strategy, on GPU and on CPU, counting accumulation as one device does."""

import atexit
import logging
import os
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
from lightning_tricks.engines._checkpoint_values import parts_of, write_parts
from lightning_tricks.engines._headline import log_headline
from lightning_tricks.engines._machine import refuse_oversubscription
from lightning_tricks.engines._nvme import no_checkpoint, offload_target, refuse_nvme
from lightning_tricks.engines._precision import BringsPrecision, Mixed
from lightning_tricks.engines._ranks import broadcast_from_rank_zero
from lightning_tricks.engines._saving import save_folder
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
from lightning_tricks.engines._zero_buckets import size_buckets
from lightning_tricks.engines._zero_config import Config, merged, read_config
from lightning_tricks.engines._zero_file import put_whole, refuse_resuming
from lightning_tricks.engines._zero_loading import leaves_frozen_out, load_folder
from lightning_tricks.engines._zero_machine import gloo_only, require_deepspeed, use_cpu
from lightning_tricks.engines._zero_manual import ManualWindow
from lightning_tricks.engines._zero_masters import share_memory
from lightning_tricks.engines._zero_modules import initialize
from lightning_tricks.engines._zero_optimizer import (
    configured_optimizer,
    refuse_changed,
    refuse_optimizer,
    refuse_untrainable,
)
from lightning_tricks.engines._zero_private import require
from lightning_tricks.engines._zero_saving import save_zero
from lightning_tricks.errors import MisconfigurationError

__all__ = ["ZeroStrategy"]

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
            parameters, but no less than 2**22 (or all of them) and no more than 2e8.
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
    writes_parts = True

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
        require_deepspeed()
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
            use_cpu()
            with gloo_only():
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
        nvme = self._offload.parameters == "nvme"
        size_buckets(self._config["zero_optimization"], self._given, trained, self.bucket_size, nvme)
        if self.activation_checkpointing is not None:
            checkpoint_blocks(self._required_module, self.activation_checkpointing)
        engine, built = self._initialize(
            model, self._config, model_parameters=trained, optimizer=optimizer, lr_scheduler=lr_scheduler
        )
        stage = self._config["zero_optimization"]["stage"]
        require(engine, stage)
        if self._offload.optimizer == "none":
            share_memory(built, stage)
        return engine, built

    def _initialize_deepspeed_inference(self, model: Module) -> None:
        kept = ["fp16", "bf16"] + ["zero_allow_untested_optimizer", "zero_optimization"] * bool(self.zero_stage_3)
        config = {"train_micro_batch_size_per_gpu": 1, **{k: self._config[k] for k in kept if k in self._config}}
        self.model, _ = self._initialize(model, config, model_parameters=[])

    def _initialize(self, model: Module, config: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        engine, optimizer = initialize(model, config, self._device_rank(), **options)
        broadcast_from_rank_zero(model.buffers(), self.root_device)  # DeepSpeed does parameters only
        normalise_in_fp32(model)
        return engine, optimizer

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
        parts = parts_of(checkpoint)
        state = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        options = {"without_frozen": leaves_frozen_out(self._required_module), "first": self.is_global_zero}

        def write(partial: Path) -> None:
            write_parts(parts, partial)
            save_zero(self.deepspeed_engine, partial, state, **options)

        save_folder(self, path, write)

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
        return load_folder(self, path, lambda: super(ZeroStrategy, self).load_checkpoint(path, weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put a single file's weights into the module. Those of a folder are there already."""
        if self._file is not None:
            put_whole(self._required_module, checkpoint["state_dict"], self._file, strict)


def _refuse_options(stage: Any, bucket_size: Any) -> None:
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise MisconfigurationError(f"`stage` must be 1, 2 or 3, got {stage!r}. Without ZeRO, use `strategy='ddp'`.")
    whole = isinstance(bucket_size, int) and not isinstance(bucket_size, bool)
    if bucket_size != "auto" and not (whole and bucket_size >= 1):
        raise MisconfigurationError(f"`bucket_size` must be 'auto' or at least 1 element, got {bucket_size!r}.")
