"""Features on one scale: fitted on the training data in one pass, kept in the checkpoint, invertible."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tricks.data._plan import check_whole
from lightning_tricks.engines import gather_over_ranks
from lightning_tricks.errors import DataError, MisconfigurationError
from lightning_tricks.functional import QuantileSketch
from lightning_tricks.functional.moments import FeatureMoments
from lightning_tricks.functional.power import best_power, power_inverse, power_transform

__all__ = ["FeatureNormalizer"]

Kind = Literal["standard", "robust", "minmax", "power"]
KINDS = ("standard", "robust", "minmax", "power")
BITS = 40  # of a deviation that are kept, of 53, and of a mean as seen from it
POINTS = 999  # quantiles by which the power of a feature is found
FAR = 1000  # deviations from 0 beyond which a power would see no difference between values


class FeatureNormalizer(nn.Module):
    """Brings each feature to one scale, by statistics of the training data alone.

    Make it a submodule and `fit` it before training, in `setup` say: its buffers then live in every checkpoint, and
    those of a checkpoint take the place of what was fitted before it was restored. Call it on a batch, in the module or
    in a collator.

    - "standard": mean 0 and variance 1, exactly.
    - "minmax": from 0 to 1, exactly.
    - "robust": the median to 0, the interquartile range to 1; quantiles are within 1% of a rank at a million rows.
    - "power": Yeo and Johnson's transform towards a normal distribution, then mean 0 and variance 1; the power, mean
      and variance are those of 999 quantiles. A feature whose median is more than 1000 deviations from 0, such as a
      time in seconds, is first moved there: the transform bends around 0.

    A constant feature becomes 0, and comes back from the inverse as what it was. Missing values (NaN) are left out of
    the statistics and become 0, which is the mean, the median or, for "minmax", the minimum.

    Args:
        features: how many, the last dimension of what is normalised.
        kind: of scale.

    Raises:
        MisconfigurationError: for an option out of range.

    Example:
        >>> normalizer = FeatureNormalizer(2)
        >>> rows = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> normalizer.fit([rows])(rows).tolist()
        [[-1.0, 0.0], [1.0, 0.0]]

    References:
        Chan, Golub, LeVeque (1979) merge variances; Yeo, Johnson (Biometrika 2000).
    """

    def __init__(self, features: int, *, kind: Kind = "standard") -> None:
        super().__init__()
        check_whole("features", features, 1)
        if kind not in KINDS:
            raise MisconfigurationError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        self.features, self.kind = features, kind
        self.statistics: Tensor
        # float64 by their bits: an engine that casts a module to bf16 leaves whole numbers alone.
        self.register_buffer("statistics", torch.zeros(5, features, dtype=torch.float64).view(torch.int64))

    @property
    def fitted(self) -> bool:
        """Whether it has statistics, from `fit` or from a checkpoint."""
        return bool(self.statistics[3, 0])  # the bits of a count above 0 are not 0

    def fit(self, batches: Iterable[Any]) -> "FeatureNormalizer":
        """Take the statistics of these rows, over all ranks, in one pass. Collective where there are several ranks.

        Args:
            batches: tensors of shape (..., features); this rank's part of the training data, in any division.

        Raises:
            DataError: if a batch has another number of features, a value is infinite, or a feature has no value.
        """
        own = _Statistics(self.features, sketched=self.kind in ("robust", "power"))
        failure: Exception | None = None
        try:
            for batch in batches:
                own.add(self._rows(batch))
        except Exception as error:  # raised below, when the other ranks know of it
            failure = error
        told = gather_over_ranks((None if failure is None else str(failure), own))
        if failure is not None:
            raise failure
        if problems := [problem for problem, _ in told if problem is not None]:
            raise DataError(f"Another rank could not read its part: {problems[0]}")
        whole = _Statistics(self.features, sketched=own.sketched)
        for _, part in told:
            whole.merge(part)
        self.statistics.copy_(torch.stack(self._found(whole)).view(torch.int64))
        return self

    def forward(self, values: Tensor) -> Tensor:
        """Normalise, in the precision of `values`.

        Raises:
            MisconfigurationError: if there are other features, or `fit` was not called.
        """
        shift, scale, power, _, origin = self._fitted(values)
        found = values.double()
        if self.kind == "power":
            found = power_transform(found - origin, power)
        normal: Tensor = (found - shift) / scale
        return normal.nan_to_num(nan=0.0).to(values.dtype)

    def inverse(self, values: Tensor) -> Tensor:
        """The values that `forward` would have made `values` of; what was missing comes back as what 0 stands for.

        Raises:
            MisconfigurationError: if there are other features, or `fit` was not called.
        """
        shift, scale, power, _, origin = self._fitted(values)
        found: Tensor = values.double() * scale + shift
        if self.kind == "power":
            found = power_inverse(found, power) + origin
        return found.to(values.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.features}, kind={self.kind!r}"

    def _fitted(self, values: Tensor) -> Tensor:
        found: Tensor = self.statistics.view(torch.float64)
        if values.shape[-1:] != (self.features,):
            raise MisconfigurationError(
                f"Values of shape {tuple(values.shape)} do not have {self.features} features in their last dimension."
            )
        if not self.fitted:
            raise MisconfigurationError("The FeatureNormalizer has no statistics yet: call `fit` with training data.")
        return found

    def _rows(self, batch: Any) -> Tensor:
        rows = torch.as_tensor(batch)
        if rows.ndim < 1 or rows.shape[-1] != self.features:
            raise DataError(f"A batch has shape {tuple(rows.shape)}, whose last dimension is not {self.features}.")
        rows = rows.reshape(-1, self.features)
        # A sum is many times as quick as a look at each value, and finite if they are.
        if not rows.sum(0).isfinite().all() and rows.isinf().any():
            raise DataError(f"Feature {int(rows.isinf().any(0).nonzero()[0])} has an infinite value. Make it NaN.")
        return rows

    def _found(self, whole: "_Statistics") -> list[Tensor]:
        """Shift, scale, power, the number of values and the origin of each feature."""
        moments = whole.moments
        if (moments.count == 0).any():
            raise DataError(f"Feature {int((moments.count == 0).nonzero()[0])} has no value. Leave it out.")
        constant = moments.most == moments.least
        power, origin = torch.ones_like(moments.mean), torch.zeros_like(moments.mean)
        if self.kind == "power":
            points = whole.quantiles([(point + 0.5) / POINTS for point in range(POINTS)])
            median = points[POINTS // 2]
            origin = median.where(~constant & (median.abs() > FAR * moments.variance().sqrt()), origin)
            points = points - origin
            power = best_power(points).where(~constant, power)
            moved = power_transform(points, power)
            shift, scale = moved.mean(0), moved.std(0, correction=0)
        elif self.kind == "robust":
            low, shift, high = whole.quantiles([0.25, 0.5, 0.75])
            scale = high - low
        elif self.kind == "minmax":
            shift, scale = moments.least, moments.most - moments.least
        else:
            deviation = moments.variance().sqrt()
            shift, scale = _rounded(moments.mean, deviation), _rounded(deviation, deviation)
        alone = power_transform(moments.least, power) if self.kind == "power" else moments.least
        shift = torch.where(constant, alone, shift)
        scale = scale.where(~constant & (scale > 0), torch.ones_like(scale))
        return [shift, scale, power, moments.count, origin]


def _rounded(values: Tensor, deviation: Tensor) -> Tensor:
    """Without the last bits as seen from the deviation, which depend on how rows are divided into batches and ranks."""
    step = torch.ldexp(torch.ones_like(deviation), torch.frexp(deviation).exponent - BITS)
    return torch.where(deviation > 0, (values / step).round() * step, values)


class _Statistics:
    """Of one rank's rows: moments, and quantiles where they are asked for."""

    def __init__(self, features: int, *, sketched: bool) -> None:
        self.sketched = sketched
        self.moments = FeatureMoments(features)
        self.sketches = [QuantileSketch() for _ in range(features if sketched else 0)]

    def add(self, rows: Tensor) -> None:
        self.moments.add(rows)
        for sketch, column in zip(self.sketches, rows.cpu().T, strict=False):
            sketch.add(column[~column.isnan()])

    def merge(self, other: "_Statistics") -> None:
        self.moments.merge(other.moments)
        for sketch, found in zip(self.sketches, other.sketches, strict=True):
            sketch.merge(found)

    def quantiles(self, shares: list[float]) -> Tensor:
        """Of shape (shares, features)."""
        return torch.stack([sketch.quantiles(shares) for sketch in self.sketches], dim=1).double()
