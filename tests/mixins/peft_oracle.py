"""peft beside our adapters: the same module, the same adapters' values."""

import warnings

import torch
from torch import nn

from lightning_tricks.layers import adapted_layers


def peft_of(module, **options):
    """The module under peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's own imports
        from peft import LoraConfig, inject_adapter_in_model

        return inject_adapter_in_model(LoraConfig(**options), module)


def share_low_rank(ours, theirs, name="default"):
    """Move ours away from their start, and give theirs the same values. Returns pairs of parameters to compare."""
    pairs = []
    for path, layer in adapted_layers(ours):
        twin = theirs.get_submodule(path)
        down, up = layer.own("lora_A", name), layer.own("lora_B", name)
        for parameter in layer.adapter_parameters(name).values():
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
        if isinstance(layer, nn.Embedding):
            pairs += [(down, twin.lora_embedding_A[name], True), (up, twin.lora_embedding_B[name], True)]
            continue
        pairs += [(down, twin.lora_A[name].weight, False), (up, twin.lora_B[name].weight, True)]
        if "lora_magnitude" in layer.adapter_parameters(name):
            pairs.append((layer.own("lora_magnitude", name), twin.lora_magnitude_vector[name].weight, False))
    with torch.no_grad():
        for mine, other, flipped in pairs:
            other.copy_((mine.t() if flipped else mine).reshape(other.shape))
    return pairs


def worst_gradient(pairs):
    """The largest difference of gradients, relative to the largest value of each."""
    worst = 0.0
    for mine, other, flipped in pairs:
        gradient = (mine.grad.t() if flipped else mine.grad).reshape(other.shape)
        worst = max(worst, float((gradient - other.grad).abs().max() / other.grad.abs().max().clamp_min(1e-30)))
    return worst
