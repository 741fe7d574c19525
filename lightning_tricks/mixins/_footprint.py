"""How much of a module is trained, and what that saves."""

from dataclasses import dataclass

from torch import nn

from lightning_tricks.layers import packed_layers

__all__ = ["TrainableReport", "trainable_report"]

_MOMENTS = 2 * 4  # bytes an element that Adam keeps in fp32: two moments


@dataclass(frozen=True)
class TrainableReport:
    """What is trained of a module, and the bytes of the training state now and if everything were trained.

    The optimizer is taken to be Adam with fp32 moments, and gradients to have their parameters' precision; what an
    engine shards, or keeps besides, such as master weights, is its own (`engine_of(trainer).memory()`).

    Args:
        trained: parameters that require a gradient.
        total: all parameters, tied ones once, those in few bits too.
        weights: bytes of all parameters.
        gradients: bytes of the gradients, now and under full fine-tuning.
        optimizer: bytes of the moments, now and under full fine-tuning.
        saved: bytes of weights that full fine-tuning would need besides: those in few bits at the precision they had.
    """

    trained: int
    total: int
    weights: int
    gradients: tuple[int, int]
    optimizer: tuple[int, int]
    saved: int = 0

    @property
    def share(self) -> float:
        """The trained part of all parameters, from 0 to 1."""
        return self.trained / max(1, self.total)

    def __str__(self) -> str:
        now = self.weights + self.gradients[0] + self.optimizer[0]
        full = self.weights + self.saved + self.gradients[1] + self.optimizer[1]
        unpacked = f" (all trained: {self.weights + self.saved:,})" if self.saved else ""
        return (
            f"{self.trained:,} of {self.total:,} parameters are trained ({100 * self.share:.3g}%). Bytes: weights "
            f"{self.weights:,}{unpacked}; gradients {self.gradients[0]:,} (all trained: {self.gradients[1]:,}); Adam "
            f"{self.optimizer[0]:,} ({self.optimizer[1]:,}); together {now:,} ({full:,})."
        )


def trainable_report(module: nn.Module) -> TrainableReport:
    """Count what is trained, and the bytes of weights, gradients and Adam's state, now and under full fine-tuning.

    Args:
        module: any module, before a strategy shards it.

    Example:
        >>> from torch import nn
        >>> from lightning_tricks.mixins import trainable_report
        >>> net = nn.Sequential(nn.Linear(9, 10).requires_grad_(False), nn.Linear(10, 2))
        >>> print(trainable_report(net))  # doctest: +NORMALIZE_WHITESPACE
        22 of 122 parameters are trained (18%). Bytes: weights 488; gradients 88 (all trained: 488);
        Adam 176 (976); together 752 (1,952).
    """
    parameters = list(module.parameters())
    sizes = {id(p): int(getattr(p, "ds_numel", p.numel())) for p in parameters}
    packed = {id(layer.kept): layer for _, layer in packed_layers(module)}
    counts = {key: packed[key].packing.elements if key in packed else size for key, size in sizes.items()}
    trained = [p for p in parameters if p.requires_grad]
    floating = [p for p in parameters if p.is_floating_point()]  # other numbers would not be trained
    saved = sum(counts[key] * layer.weight_dtype.itemsize - sizes[key] for key, layer in packed.items())
    everything = sum(counts[id(p)] for p in floating) + sum(counts[key] for key in packed)
    in_few_bits = sum(counts[key] * layer.weight_dtype.itemsize for key, layer in packed.items())
    counted = sum(sizes[id(p)] for p in trained)
    return TrainableReport(
        trained=counted,
        total=sum(counts.values()),
        weights=sum(sizes[id(p)] * p.element_size() for p in parameters),
        gradients=(
            sum(sizes[id(p)] * p.element_size() for p in trained),
            sum(sizes[id(p)] * p.element_size() for p in floating) + in_few_bits,
        ),
        optimizer=(counted * _MOMENTS, everything * _MOMENTS),
        saved=saved,
    )
