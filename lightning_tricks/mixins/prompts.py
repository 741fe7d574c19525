"""Prompt tuning and prefix tuning of Hugging Face models."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers import Prefix, Prompt, Prompts
from lightning_tricks.mixins._method import Method

__all__ = ["PrefixTuning", "PromptTuning"]

_REASON = "it is no change of a weight. Keep it beside the base."


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trained vectors before the tokens of a Hugging Face model, which is called with keyword arguments.

    The outputs are as long as the tokens. A pooler inside the model that reads the first position reads the prompt's,
    as under peft: pool the last hidden states yourself.

    Args:
        tokens: how many, 1 or more; 5 to 100 in practice.
        init: `vocabulary`: the vectors of randomly chosen tokens; `random`: uniform from -0.5 to 0.5.

    Raises:
        MisconfigurationError: if an option is out of its range.

    Example:
        >>> from lightning_tricks.mixins import PromptTuning
        >>> PromptTuning(tokens=10)
        PromptTuning(tokens=10, init='vocabulary')

    References:
        Lester, Al-Rfou, Constant: The power of scale for parameter-efficient prompt tuning (EMNLP 2021).
    """

    tokens: int = 20
    init: Literal["vocabulary", "random"] = "vocabulary"

    recorded: ClassVar[tuple[str, ...]] = ("tokens",)
    mergeable: ClassVar[bool] = False
    reason: ClassVar[str] = _REASON

    def __post_init__(self) -> None:
        _require_tokens(self.tokens)
        if self.init not in ("vocabulary", "random"):
            raise MisconfigurationError(f"`init` must be vocabulary or random, got {self.init!r}.")

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The model itself.

        Raises:
            MisconfigurationError: if it is no model of Hugging Face's, or has a prompt of this name.
        """
        return {"": _table(module, name)}

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Put a prompt before its tokens."""
        table = plan[""]
        prompts = Prompts.of(module, table.embedding_dim)
        prompts.add_adapter(name, Prompt(self.tokens, self.init))
        prompts.to(device=table.weight.device)
        if self.init == "vocabulary":
            weight = whole(table.weight)
            chosen = torch.randint(0, weight.shape[0], (self.tokens,), device=weight.device)
            with torch.no_grad():
                prompts.own("prompt", name).copy_(weight[chosen])

    def shapes(self, plan: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Of the vectors."""
        return {"prompts.prompt": (self.tokens, plan[""].embedding_dim)}


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trained keys and values before those of every layer of a Hugging Face decoder.

    Args:
        tokens: how many, 1 or more; 5 to 200 in practice.
        reparametrised: width of a network with one inner layer that makes them from fewer numbers, as the paper does
            for stability; 0 trains them directly.

    Raises:
        MisconfigurationError: if an option is out of its range.

    Example:
        >>> from lightning_tricks.mixins import PrefixTuning
        >>> PrefixTuning(tokens=10, reparametrised=512)
        PrefixTuning(tokens=10, reparametrised=512)

    References:
        Li, Liang: Prefix-tuning: Optimizing continuous prompts for generation (ACL 2021).
    """

    tokens: int = 20
    reparametrised: int = 0

    recorded: ClassVar[tuple[str, ...]] = ("tokens", "reparametrised")
    mergeable: ClassVar[bool] = False
    reason: ClassVar[str] = _REASON

    def __post_init__(self) -> None:
        _require_tokens(self.tokens)
        if isinstance(self.reparametrised, bool) or not isinstance(self.reparametrised, int) or self.reparametrised < 0:
            raise MisconfigurationError(
                f"`reparametrised` must be a width, or 0 for none, got {self.reparametrised!r}: try 512."
            )

    def plan(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The model itself, with its shape.

        Raises:
            MisconfigurationError: if it is no decoder of Hugging Face's, or has a prompt of this name.
        """
        table = _table(module, name)
        config: Any = module.config
        decoder = bool(getattr(config, "is_decoder", False)) or not _is_bidirectional(config)
        if getattr(config, "is_encoder_decoder", False) or not decoder:
            raise MisconfigurationError(
                f"a prefix goes through the cache of a decoder, and {type(module).__name__} is none: use PromptTuning."
            )
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        options = Prefix(
            self.tokens,
            int(config.num_hidden_layers),
            int(getattr(config, "num_key_value_heads", None) or heads),
            width,
            self.reparametrised,
        )
        return {"": (table, options)}

    def attach(self, module: nn.Module, name: str, plan: dict[str, Any]) -> None:
        """Put a prefix before its keys and values."""
        table, options = plan[""]
        prompts = Prompts.of(module, table.embedding_dim)
        prompts.add_adapter(name, options)
        prompts.to(device=table.weight.device)

    def shapes(self, plan: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Of the keys and values of all layers, without a network that makes them: peft's format holds what it made."""
        _, options = plan[""]
        return {"prompts.prefix": (options.tokens, 2 * options.layers * options.heads * options.head_width)}


def exported_prompt(module: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensor of peft's format: of a prefix, what its network has made. Collective."""
    prompts: Any = module.prompts
    options = prompts.adapters[name]
    config: Any = module.config
    causal = module.get_output_embeddings() is not None  # type: ignore[operator]
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",  # without which peft does not load a prompt
        "num_virtual_tokens": options.tokens,
        "token_dim": prompts.width,
        "num_transformer_submodules": 1,
        "num_attention_heads": int(config.num_attention_heads),
        "num_layers": int(config.num_hidden_layers),
    }
    if isinstance(options, Prompt):
        values = whole(prompts.own("prompt", name))
        return {"peft_type": "PROMPT_TUNING", **settings}, {"prompt_embeddings": values.float().cpu()}
    parts = {kind: whole(value) for kind, value in prompts.adapter_parameters(name).items()}
    made = parts["prefix"].float()
    if options.reparametrised:
        inner = nn.functional.linear(made, parts["prefix_in"].float(), parts["prefix_in_bias"].float()).tanh()
        made = nn.functional.linear(inner, parts["prefix_out"].float(), parts["prefix_out_bias"].float())
    settings |= {"encoder_hidden_size": prompts.width, "prefix_projection": False}
    if options.heads != settings["num_attention_heads"]:  # peft splits by the heads of keys and values then
        settings |= {"num_attention_heads": options.heads, "token_dim": options.heads * options.head_width}
    return {"peft_type": "PREFIX_TUNING", **settings}, {"prompt_embeddings": made.cpu()}


def _is_bidirectional(config: Any) -> bool:
    """Encoders say so by their masked-language heads; decoders are made for causal ones alone."""
    architectures = getattr(config, "architectures", None) or []
    masked = any("MaskedLM" in name for name in architectures)
    return masked or getattr(config, "model_type", "") in _ENCODERS


_ENCODERS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta")


def _table(module: nn.Module, name: str) -> Any:
    find = getattr(module, "get_input_embeddings", None)
    if find is None or getattr(module, "config", None) is None:
        raise MisconfigurationError(
            f"prompts are for models of Hugging Face's, and {type(module).__name__} is none: use LoRA."
        )
    held = getattr(module, "prompts", None)
    if isinstance(held, Prompts) and name in held.adapters:
        raise MisconfigurationError(f"there is a prompt {name!r} already: give this one another name.")
    return find()


def _require_tokens(tokens: Any) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise MisconfigurationError(f"`tokens` must be a whole number of 1 or more, got {tokens!r}: try 20.")
