"""GPT-2's linear layer, whose weight is (inputs, outputs), with adapters that rescale. Imports transformers."""

from typing import Any

from transformers.pytorch_utils import Conv1D

from lightning_tricks.layers.scaled import ScaledLayer

__all__ = ["ScaledTransposed"]


class ScaledTransposed(ScaledLayer, Conv1D):  # type: ignore[misc]
    """`transformers.pytorch_utils.Conv1D` whose inputs or outputs adapters rescale.

    Example:
        >>> from transformers.pytorch_utils import Conv1D
        >>> from lightning_tricks.layers import Scaling
        >>> from lightning_tricks.layers.scaled_transposed import ScaledTransposed
        >>> layer = ScaledTransposed.convert(Conv1D(6, 4))
        >>> layer.add_adapter("default", Scaling(inputs=True))
        >>> layer.ia3_l.shape
        torch.Size([4])
    """

    output_axis = 1

    def sizes(self) -> tuple[int, int]:
        """The number of outputs and of inputs."""
        layer: Any = self
        return layer.nf, layer.nx
