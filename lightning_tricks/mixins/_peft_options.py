"""Which options of peft's configurations leave the meaning of an adapter's tensors as it is."""

from typing import Any

from lightning_tricks.errors import CheckpointError
from lightning_tricks.mixins._adapter_folder import AdapterFolder

__all__ = ["require_known_options"]

# Read here, or of no consequence: names of things, and how the adapter came about.
_ALWAYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
}
_PROMPTS = {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
_KNOWN = {
    "IA3": {"fan_in_fan_out", "feedforward_modules", "init_ia3_weights"},
    "LORA": {
        "alpha_pattern",
        "eva_config",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
        "velora_config",
    },
    "PREFIX_TUNING": {*_PROMPTS, "encoder_hidden_size", "init_weights", "prefix_projection"},
    "PROMPT_TUNING": {
        *_PROMPTS,
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    },
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that do


def require_known_options(folder: AdapterFolder) -> None:
    """Refuse options that are set and not known: they may change what the tensors mean.

    Raises:
        CheckpointError: naming the option.
    """
    start = folder.config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{folder.path} starts by {start!r}, which changes the base itself: save it with peft's "
            "`path_initial_model_for_weight_conversion`, which makes a plain LoRA of it."
        )
    known = _ALWAYS | _KNOWN[folder.config["peft_type"]]
    for option, value in folder.config.items():
        if option not in known and _is_set(option, value):
            raise CheckpointError(f"{folder.path} was made with {option}={value!r}, which has no counterpart.")


def _is_set(option: str, value: Any) -> bool:
    return value not in (None, False, "", [], {}) and (option, value) != ("bias", "none")
