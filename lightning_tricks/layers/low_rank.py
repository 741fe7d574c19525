"""Low-rank adapters of any layer with a weight: what they hold, how they start, what they add to the weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_tricks.engines import whole
from lightning_tricks.errors import MisconfigurationError
from lightning_tricks.functional import Packing
from lightning_tricks.layers.adapted import AdaptedLayer

__all__ = ["LowRank", "LowRankLayer"]


@dataclass(frozen=True)
class LowRank:
    """The options of one low-rank adapter in one layer.

    Args:
        rank: of the update.
        alpha: the update is scaled by `alpha / rank`.
        dropout: of the adapter's inputs.
        rslora: scale by `alpha / sqrt(rank)` instead.
        init: how the factors start.
        slices: ranges of outputs, each with factors of its own; empty: all outputs together.
        decomposed: whether rows have trained lengths (DoRA).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    slices: tuple[tuple[int, int], ...] = ()
    decomposed: bool = False

    @property
    def scale(self) -> float:
        """By which the product of the factors is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRankLayer(AdaptedLayer):
    """A layer whose weight, seen as a matrix of shape (outputs, inputs), has updates `scale * B.T @ A`.

    `A` is kept as `lora_A` of shape (rank, inputs) and `B`, transposed with respect to the paper, as `lora_B` of shape
    (rank, outputs), in fp32. A new adapter adds exactly nothing. With `init="pissa"` the factors start at the weight's
    principal part, and that start is kept beside them and subtracted: the base's own weight stays as it is.
    """

    kinds = ("lora_A", "lora_B", "lora_magnitude")
    adapters: dict[str, LowRank]
    packing: Packing | None = None  # of a weight that is kept in few bits

    @property
    def kept(self) -> Tensor:
        """What holds the weight."""
        return cast(Tensor, self.weight)

    def matrix_shape(self) -> tuple[int, int]:
        """The weight's (outputs, inputs). Each kind of layer has its own."""
        raise NotImplementedError

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape, as the matrix (outputs, inputs). Each kind of layer has its own."""
        raise NotImplementedError

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The reverse of `as_matrix`. Each kind of layer has its own."""
        raise NotImplementedError

    def _create(self, name: str, options: LowRank) -> None:
        outputs, inputs = self.matrix_shape()
        groups = max(1, len(options.slices))
        wide = sum(stop - start for start, stop in options.slices) or outputs
        device = self.kept.device
        self.set_own("lora_A", name, nn.Parameter(torch.empty(groups * options.rank, inputs, device=device)))
        self.set_own("lora_B", name, nn.Parameter(torch.empty(options.rank, wide, device=device)))
        if options.decomposed:
            self.set_own("lora_magnitude", name, nn.Parameter(torch.empty(outputs, device=device)))
        self.reset_adapter(name)

    @torch.no_grad()
    def reset_adapter(self, name: str = "default") -> None:
        """Start an adapter anew, so that it adds nothing."""
        options, down, up = self.adapters[name], self.own("lora_A", name), self.own("lora_B", name)
        if options.init == "gaussian":
            nn.init.normal_(down, std=1 / options.rank)
        else:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up)
        if options.init == "pissa":
            self._start_at_principal_part(name)
        if options.decomposed:
            weight = self.as_matrix(whole(cast(Tensor, self.weight)))
            self.own("lora_magnitude", name).copy_(torch.linalg.vector_norm(weight.float(), dim=1))

    def _start_at_principal_part(self, name: str) -> None:
        options, down, up = self.adapters[name], self.own("lora_A", name), self.own("lora_B", name)
        weight = self.as_matrix(whole(cast(Tensor, self.weight))).float()
        start, rank = 0, options.rank
        for number, (first, last) in enumerate(options.slices or ((0, weight.shape[0]),)):
            left, values, right = torch.linalg.svd(weight[first:last], full_matrices=False)
            root = (values[:rank] / options.scale).sqrt()
            down[number * rank : (number + 1) * rank].copy_(root[:, None] * right[:rank])
            up[:, start : start + last - first].copy_((left[:, :rank] * root).t())
            start += last - first
        for kind, value in (("lora_A_start", down), ("lora_B_start", up)):
            key = kind if name == "default" else f"{kind}_{name}"
            self.register_buffer(key, value.detach().clone())

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """What is multiplied: of shapes (k, inputs) and (k, outputs), where k is the rank, once for each slice."""
        return self.assemble(name, self.own("lora_A", name), self.own("lora_B", name))

    def assemble(self, name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """`factors`, of given values of `lora_A` and `lora_B`."""
        options = self.adapters[name]
        wide = self._spread(options.slices, up)
        if options.init == "pissa":
            before = self._spread(options.slices, self.own("lora_B_start", name).to(up.device))
            return torch.cat((down, self.own("lora_A_start", name).to(down.device))), torch.cat((wide, -before))
        return down, wide

    def _spread(self, slices: tuple[tuple[int, int], ...], up: Tensor) -> Tensor:
        """`lora_B` over all outputs: for each slice, rows that are zero outside it."""
        outputs, blocks, start = self.matrix_shape()[0], [], 0
        for first, last in slices:
            block = up[:, start : start + last - first]
            blocks.append(nn.functional.pad(block, (first, outputs - last)))
            start += last - first
        return torch.cat(blocks) if blocks else up

    def merged_values(self) -> dict[str, Tensor]:
        """The weight with the active adapters in it, computed in fp32 or wider, at the weight's own precision."""
        weight = cast(Tensor, self.weight).detach()
        exact = torch.promote_types(weight.dtype, torch.float32)
        matrix = self.as_matrix(weight).to(exact)
        with torch.no_grad():
            for name, share in self.active.items():
                options = self.adapters[name]
                down, up = (factor.to(exact) for factor in self.factors(name))
                update = up.t().mm(down)
                if options.decomposed:
                    matrix = matrix + options.scale * update
                    lengths = torch.linalg.vector_norm(matrix, dim=1).clamp_min(1e-12)
                    matrix = matrix * (self.own("lora_magnitude", name).to(exact) / lengths)[:, None]
                else:
                    matrix = matrix + (share * options.scale) * update
        return {"weight": self.as_weight(matrix).to(weight.dtype)}

    def dropout_of(self, name: str) -> float:
        """The probability of dropping an input of an adapter now. The mode is looked at only where it matters."""
        dropout = self.adapters[name].dropout
        return dropout if dropout and self.training else 0.0

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Rows of trained lengths cannot be mixed.

        Raises:
            MisconfigurationError: if a DoRA adapter is combined with another, or weighted.
        """
        here = {name: weight for name, weight in weights.items() if name in self.adapters}
        if any(self.adapters[name].decomposed for name in here) and list(here.values()) != [1.0]:
            raise MisconfigurationError(
                f"a DoRA adapter replaces the lengths of rows: it cannot be weighted or combined, as in {here}. "
                "Activate it alone, with weight 1."
            )

    def extra_repr(self) -> str:
        """The layer's sizes and the adapters'."""
        told = [
            f"rank={options.rank}, alpha={options.alpha:g}, dropout={options.dropout:g}"
            if name == "default"
            else f"{name}: rank={options.rank}, alpha={options.alpha:g}, dropout={options.dropout:g}"
            for name, options in self.adapters.items()
        ]
        return ", ".join([super().extra_repr(), *told])
