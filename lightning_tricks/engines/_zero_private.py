"""What DeepSpeed does not promise to keep, and the suite touches: one list, and one check of it before the first step.

A name that is looked for and gone would make a parameter look like a plain one, and a trick act on a part of it. So
each engine that is built is held against the list, and `tests/engines/test_private.py` holds the code against it.
"""

from collections.abc import Iterator
from typing import Any

from lightning_tricks.errors import UnsupportedError

__all__ = ["ENGINE", "FRAGMENT", "MODULES", "OPTIMIZER", "PARAMETER", "require"]

ENGINE = (
    "_config",
    "_copy_recovery_script",
    "_flush_coalesced_reduction_zero12",
    "checkpoint_engine",
    "communication_data_type",
    "set_gradient_accumulation_boundary",
)
_EVERY_STAGE = (
    "_optimizer_step",
    "_update_scale",
    "averaged_gradients",
    "clear_backward_seen_flag",
    "clip_grad",
    "custom_loss_scaler",
    "external_loss_scale",
    "finalize_gradient_accumulation_boundary",
    "get_param_id",
    "loss_scale",
    "unscale_and_clip_grads",
)
_FIRST_STAGES = (
    *_EVERY_STAGE,
    "_hp_optimizer_states_linked",
    "_link_all_hp_params",
    "bit16_groups",
    "check_grad_overflow",
    "cpu_offload",
    "parallel_partitioned_bit16_groups",
    "params_in_partition",
    "real_dp_process_group",
    "scaled_global_norm",
    "single_partition_of_fp32_groups",
    "update_lp_params",
)
OPTIMIZER = {
    1: _FIRST_STAGES,
    2: _FIRST_STAGES,
    3: (
        *_EVERY_STAGE,
        "_get_norm_groups",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
        "_restore_from_bit16_weights",
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "grad_position",
        "invalidate_secondary_tensor",
        "offload_optimizer",
        "persistent_parameters",
        "swap_optimizer",
    ),
}
# Of a trained parameter, at each stage; and of what stages 1 and 2 tell of the part of it that this rank updates.
PARAMETER = {
    1: ("_hp_mapping",),
    2: ("_hp_mapping",),
    3: ("_z3_optimizer", "ds_id", "ds_numel", "ds_process_group", "ds_shape", "ds_tensor"),
}
FRAGMENT = ("hp_fragment", "hp_fragment_address", "lp_fragment_address")
# Where the suite reaches into modules themselves.
MODULES = {
    "deepspeed.checkpoint.ds_to_universal": ("main",),
    "deepspeed.comm.torch": ("build_shm_op",),
    "deepspeed.runtime.utils": ("combine_grad_norm_groups",),
    "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload": ("partition_all_parameters",),
}


def require(engine: Any, stage: int) -> None:
    """Refuse an engine of DeepSpeed's that lacks any of the names, before it trains.

    Args:
        engine: as `deepspeed.initialize` built it, with an optimizer.
        stage: 1, 2 or 3.

    Raises:
        UnsupportedError: naming the first one, and the DeepSpeed installed.
    """
    missing = next(_missing(engine, stage), None)
    if missing is not None:
        import deepspeed

        raise UnsupportedError(
            "ZeRO",
            f"DeepSpeed {deepspeed.__version__}",
            f"it has no `{missing}`",
            "install the DeepSpeed of constraints.txt",
        )


def _missing(engine: Any, stage: int) -> Iterator[str]:
    owners = [("engine", engine, ENGINE), ("optimizer", engine.optimizer, OPTIMIZER[stage])]
    trained = next((parameter for parameter in engine.module.parameters() if parameter.requires_grad), None)
    if trained is not None:
        owners.append(("parameter", trained, PARAMETER[stage]))
        if (fragment := getattr(trained, "_hp_mapping", None)) is not None:
            owners.append(("parameter._hp_mapping", fragment, FRAGMENT))
    for what, owner, names in owners:
        yield from (f"{what}.{name}" for name in names if not hasattr(owner, name))
