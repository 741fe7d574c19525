"""Keeping torch's own layers from going past an adapter."""

from torch import nn

from lightning_tricks.layers.adapted import AdaptedLayer

__all__ = ["leave_fast_path"]


def leave_fast_path(module: nn.Module) -> None:
    """Make torch's transformer encoders call their adapted layers.

    In evaluation `nn.TransformerEncoderLayer` hands the weights of its linear layers to one fused kernel, and the
    adapters beside them have no say. Layers without an adapter keep the fast path.

    Args:
        module: the module whose linear layers have been adapted.

    Example:
        >>> from torch import nn
        >>> from lightning_tricks.layers import LoRALinear, leave_fast_path
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False).eval()
        >>> _ = LoRALinear.extend(layer.linear1, rank=2, alpha=4)
        >>> leave_fast_path(layer)
        >>> layer.activation_relu_or_gelu  # 0: the fused kernel knows no such activation
        0
    """
    for inner in module.modules():
        adapted = any(isinstance(m, AdaptedLayer) for m in inner.modules())
        if adapted and isinstance(inner, nn.TransformerEncoderLayer):
            inner.activation_relu_or_gelu = 0
        if adapted and isinstance(inner, nn.TransformerEncoder):
            inner.use_nested_tensor = False
