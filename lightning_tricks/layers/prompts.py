"""Trained vectors before a Hugging Face model's tokens, or before the keys and values of each of its layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tricks.engines._activation_checkpointing import recomputes
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.layers.adapted import AdaptedLayer

__all__ = ["Prefix", "Prompt", "Prompts"]

ATTRIBUTE = "prompts"  # under which a model holds them


@dataclass(frozen=True)
class Prompt:
    """The options of one prompt before the tokens.

    Args:
        tokens: how many vectors.
        init: `vocabulary`: those of randomly chosen tokens; `random`: uniform from -0.5 to 0.5.
    """

    tokens: int
    init: Literal["vocabulary", "random"] = "vocabulary"


@dataclass(frozen=True)
class Prefix:
    """The options of one prefix of every layer's keys and values.

    Args:
        tokens: how many of each.
        layers: of the model.
        heads: of keys and values.
        head_width: of one head.
        reparametrised: width of the network that the prefix is made by; 0: it is trained itself.
    """

    tokens: int
    layers: int
    heads: int
    head_width: int
    reparametrised: int = 0


class Prompts(AdaptedLayer):
    """The prompts and prefixes of one model, of which one at a time is active.

    Hooks of the model put the active one before what it reads, and take its positions off what it gives. The model is
    called with keyword arguments, as Hugging Face's are.

    Args:
        width: of the model's token vectors.
    """

    kinds = ("prompt", "prefix", "prefix_in", "prefix_in_bias", "prefix_out", "prefix_out_bias")

    def __init__(self, width: int) -> None:
        super().__init__()
        self._begin()
        self.width = width

    @classmethod
    def of(cls, host: nn.Module, width: int) -> "Prompts":
        """Those of a model, which gets them if it has none."""
        present = getattr(host, ATTRIBUTE, None)
        if isinstance(present, cls):
            return present
        made = cls(width)
        host.add_module(ATTRIBUTE, made)
        host.register_forward_pre_hook(_before, with_kwargs=True)
        host.register_forward_hook(_after, with_kwargs=True)
        return made

    def _create(self, name: str, options: Prompt | Prefix) -> None:
        if isinstance(options, Prompt):
            self.set_own("prompt", name, nn.Parameter(torch.rand(options.tokens, self.width) - 0.5))
            return
        made = 2 * options.layers * options.heads * options.head_width
        inner = options.reparametrised
        if not inner:
            self.set_own("prefix", name, nn.Parameter(0.02 * torch.randn(options.tokens, made)))
            return
        self.set_own("prefix", name, nn.Parameter(torch.randn(options.tokens, self.width)))
        for kind, rows, columns in (("prefix_in", inner, self.width), ("prefix_out", made, inner)):
            weight = torch.empty(rows, columns)
            nn.init.kaiming_uniform_(weight, a=5**0.5)
            self.set_own(kind, name, nn.Parameter(weight))
            self.set_own(f"{kind}_bias", name, nn.Parameter(torch.zeros(rows)))

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """One prompt comes before the tokens, not a mixture.

        Raises:
            MisconfigurationError: if several are to be active, or one with a weight.
        """
        here = {name: weight for name, weight in weights.items() if name in self.adapters}
        if here and list(here.values()) != [1.0]:
            raise MisconfigurationError(
                f"prompts cannot be weighted or combined, as in {here}: activate one alone, with weight 1."
            )

    def merged_values(self) -> dict[str, Tensor]:
        """There is no weight for them; the method refuses before it comes to this."""
        raise MisconfigurationError("a prompt is no weight and cannot be merged: keep it beside the base.")

    def forward(self) -> Tensor:
        """The active prompt, of shape (tokens, width), or prefix, (tokens, 2 * layers * heads * head width)."""
        (name,) = self.active
        if isinstance(self.adapters[name], Prompt):
            prompt: Tensor = self.own("prompt", name)
            return prompt
        return self._made(name)

    def _made(self, name: str) -> Tensor:
        prefix: Tensor = self.own("prefix", name)
        if self.adapters[name].reparametrised:
            inner = nn.functional.linear(prefix, self.own("prefix_in", name), self.own("prefix_in_bias", name))
            return nn.functional.linear(inner.tanh(), self.own("prefix_out", name), self.own("prefix_out_bias", name))
        return prefix


def _before(host: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    prompts: Prompts = getattr(host, ATTRIBUTE)
    if not prompts.active:
        return None
    _refuse(host, arguments, named)
    (options,) = (prompts.adapters[name] for name in prompts.active)
    if isinstance(options, Prefix):
        _refuse_recomputing(host)
    named = dict(named)
    tokens = named.get("input_ids")
    given = tokens if tokens is not None else named.get("inputs_embeds")
    if given is None:
        raise MisconfigurationError("a prompt needs `input_ids` or `inputs_embeds`, and the model was given neither.")
    cache = named.get("past_key_values")
    mask = named.get("attention_mask")
    if mask is None:
        past = 0 if cache is None else max(0, cache.get_seq_length() - options.tokens)
        mask = given.new_ones(len(given), past + given.shape[1], dtype=torch.long)
    named["attention_mask"] = torch.cat((mask.new_ones(len(mask), options.tokens), mask), dim=1)
    named.pop("cache_position", None)  # the model knows how long its cache is
    if named.get("position_ids") is not None:
        named["position_ids"] = named["position_ids"] + options.tokens
    if cache is not None and cache.get_seq_length():
        return arguments, named  # a step of generation: what comes first is in the cache
    if isinstance(options, Prompt):
        _prepend(host, prompts, options, named)
    else:
        named["past_key_values"] = _fill(host, prompts(), options, len(given), cache)
        named["use_cache"] = True
    return arguments, named


def _prepend(host: Any, prompts: Prompts, options: Prompt, named: dict[str, Any]) -> None:
    embedded = named.get("inputs_embeds")
    if embedded is None:
        embedded = host.get_input_embeddings()(named.pop("input_ids"))
    named["input_ids"] = None
    prompt = prompts().to(embedded.dtype).expand(len(embedded), -1, -1)
    named["inputs_embeds"] = torch.cat((prompt, embedded), dim=1)
    if (places := named.get("position_ids")) is not None:
        first = torch.arange(options.tokens, device=places.device).expand(len(places), -1)
        named["position_ids"] = torch.cat((first, places), dim=1)
    for key, value in (("labels", -100), ("token_type_ids", 0)):
        if named.get(key) is not None and named[key].shape[1:] == embedded.shape[1:2]:
            before = named[key].new_full((len(embedded), options.tokens), value)
            named[key] = torch.cat((before, named[key]), dim=1)


def _fill(host: Any, prefix: Tensor, options: Prefix, batch: int, cache: Any) -> Any:
    """The user's cache, or one for this call alone, with the prefix in it."""
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.of_this_call = True
    shape = options.tokens, 2 * options.layers, options.heads, options.head_width
    parts = prefix.to(host.dtype).view(shape).permute(1, 2, 0, 3)  # (2 * layers, heads, tokens, head width)
    for layer in range(options.layers):
        keys, values = (parts[2 * layer + part].expand(batch, -1, -1, -1) for part in (0, 1))
        cache.update(keys, values, layer)
    return cache


def _after(host: Any, _arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> Any:
    """Take the prompt's positions off the outputs, so that they are as long as the tokens."""
    prompts: Prompts = getattr(host, ATTRIBUTE)
    options = [prompts.adapters[name] for name in prompts.active]
    if not options:
        return out
    cache = named.get("past_key_values")
    if isinstance(options[0], Prefix):
        if getattr(cache, "of_this_call", False):  # it is no output of the user's
            out.past_key_values = None
        return out
    embedded = named.get("inputs_embeds")
    if embedded is None or (cache is not None and cache.get_seq_length() > embedded.shape[1]):
        return out  # a step of generation, before which nothing was put
    for key in ("last_hidden_state", "logits"):
        value = out.get(key)
        if value is not None and value.dim() == 3 and value.shape[1] == embedded.shape[1]:
            out[key] = value[:, options[0].tokens :]
    return out


def _refuse_recomputing(host: Any) -> None:
    """What is computed again is computed without the cache, or adds to it a second time."""
    if not host.training:
        return
    if recomputes(host) or any(getattr(part, "gradient_checkpointing", False) for part in host.modules()):
        raise MisconfigurationError(
            f"a prefix goes through the cache, which activation checkpointing leaves out, and {type(host).__name__} "
            "trains with it: turn it off (`gradient_checkpointing_disable()`, or the strategy's "
            "`activation_checkpointing=None`), or use PromptTuning."
        )


def _refuse(host: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    if arguments:
        raise MisconfigurationError(
            f"a {type(host).__name__} with a prompt takes keyword arguments only: write `model(input_ids=...)`."
        )
    cache = named.get("past_key_values")
    if cache is not None and type(cache).__name__ != "DynamicCache":
        raise MisconfigurationError(
            f"a {type(cache).__name__} has no room for the prompt's positions: generate with the default cache."
        )
    if named.get("return_dict") is False:
        raise MisconfigurationError("a prompt's positions are taken off by name: leave out `return_dict=False`.")
