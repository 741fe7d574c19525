"""The rows of AdapterMixin: one for each method."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.layers import adapted_layers
from lightning_tricks.mixins import (
    IA3,
    AdapterFusion,
    AdapterMixin,
    BitFit,
    Bottleneck,
    DoRA,
    LoRA,
    PrefixTuning,
    PromptTuning,
)
from lightning_tricks.mixins._method import Method
from tests.conformance.model import VOCABULARY, WIDTH, Classifier, warm_up

METHODS: dict[str, Method] = {
    "LoRA": LoRA(rank=3, alpha=6, targets=("embedding", "query", "value:0-9"), rslora=True),
    "LoRA+, PiSSA": LoRA(rank=3, alpha=6, targets=("query", "value"), init="pissa", plus=4),
    "QLoRA": LoRA(rank=3, alpha=6, targets=("query", "value", "down")),
    "DoRA": DoRA(rank=4, alpha=8, targets=("query", "value")),
    "IA3": IA3(targets=("key", "value"), feedforward=("down",)),
    "BitFit": BitFit(targets=("*",)),
    "Bottleneck": Bottleneck(width=4, targets=("value", "down"), activation="gelu"),
    "AdapterFusion": AdapterFusion(adapters=("first", "second")),
    "PromptTuning": PromptTuning(tokens=3),
    "PrefixTuning": PrefixTuning(tokens=3, reparametrised=5),
}
BASES: dict[str, Any] = {"QLoRA": "nf4"}


class Adapted(AdapterMixin, Classifier):
    """Its encoder is adapted by one of the methods; the last norm of the encoder, and the head, are trained too."""

    def __init__(self, method: str) -> None:
        super().__init__()
        policy = METHODS[method]
        norm = "norm"
        if isinstance(policy, PromptTuning | PrefixTuning):
            self.encoder, norm = Decoder(), "ln_f"
        net = self.encoder.net if isinstance(self.encoder, Decoder) else self.encoder
        if isinstance(policy, AdapterFusion):
            self.adapt_as_if_trained(net, policy.adapters)
        self.adapt(net, policy, trainable=(norm,), base=BASES.get(method))

    def adapt_as_if_trained(self, net: nn.Module, names: Sequence[str]) -> None:
        """Give it bottleneck adapters that change something, as those that are fused have been trained."""
        for name in names:
            self.adapt(net, METHODS["Bottleneck"], name=name)
            for _, layer in adapted_layers(net):
                nn.init.normal_(layer.own("up", name), std=0.5)  # else Adam steps by rounding

    def configure_optimizers(self) -> dict[str, Any]:
        """As in every row, over the groups that LoRA+ asks for."""
        optimizer = torch.optim.AdamW(self.parameter_groups(lr=1e-2, weight_decay=1e-2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up(optimizer), "interval": "step"}}


class Decoder(nn.Module):
    """A Hugging Face model instead of the encoder: prompts are for those."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(
            n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=VOCABULARY, n_positions=20, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.net = GPT2Model(config)

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != 0).long()
        hidden = self.net(input_ids=tokens, attention_mask=real).last_hidden_state
        weights = real.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


class Rows:
    """What a row needs, for one method."""

    def __init__(self, method: str) -> None:
        self.method = method
        fused = getattr(METHODS[method], "adapters", ())
        self.at_rest = rf"_({'|'.join(fused)})$" if fused else "^$"

    def build(self) -> Any:
        from tests.conformance.cases import Run

        return Run(Adapted(self.method))

    def observe(self, run: Any, trainer: L.Trainer) -> dict[str, Any]:
        return {"base": frozen(run.module)}

    def check(self, outcome: dict[str, Any]) -> None:
        """All that is trained has moved; the base, adapters at rest and what PiSSA subtracts have not.

        A checkpoint holds all but the base.
        """
        L.seed_everything(0, verbose=False)
        fresh = Adapted(self.method)
        assert outcome["weights"].keys() == fresh.state_dict().keys()
        starts = {name for name, _ in fresh.named_buffers() if "_start" in name}
        at_rest = starts | {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
        for name, value in fresh.state_dict().items():
            found = outcome["weights"][name]
            if name in at_rest:
                assert is_kept(found, value), f"{name} has moved"
            else:
                assert not torch.equal(found, value), f"{name} was not trained"
        base, found = frozen(fresh), outcome["facts"]["base"]
        assert found.keys() == base.keys()
        assert all(is_kept(found[name], value) for name, value in base.items()), "the base has moved"


def is_kept(found: Tensor, value: Tensor) -> bool:
    """Whether it is what it was, or that in bf16, where an engine keeps what is not trained in it."""
    return any(torch.equal(found.float(), one) for one in (value.float(), value.bfloat16().float()))


def frozen(module: L.LightningModule) -> dict[str, torch.Tensor]:
    """The frozen parameters, whole. Collective."""
    return {name: whole(p).float().clone() for name, p in module.named_parameters() if not p.requires_grad}


ROWS = {name: Rows(name) for name in METHODS}
