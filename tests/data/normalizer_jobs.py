"""FeatureNormalizer on two ranks: each passes over its own part."""

import os
import warnings

import torch

from lightning_tricks.data import FeatureNormalizer
from lightning_tricks.errors import DataError


def start() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def rows() -> torch.Tensor:
    """Skewed features, one of them of times in seconds, with missing values."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(30_000, 3, generator=generator, dtype=torch.float64).exp()
    data = data * torch.tensor([1.0, 100.0, 60.0]) + torch.tensor([0.0, -50.0, 1.7e9])
    return data.masked_fill(torch.rand(data.shape, generator=generator) < 0.1, torch.nan)


def fit(kind: str) -> list[list[float]]:
    """The first rank has a third of the rows, the second the rest; what comes of the first thousand rows."""
    data = rows()
    part = (data[:10_000], data[10_000:])[int(os.environ["RANK"])]
    normalizer = FeatureNormalizer(3, kind=kind).fit(part.split(700))
    return normalizer(data[:1000]).tolist()


def fit_what_is_broken_on_one() -> str:
    """The second rank has an infinite value."""
    data = rows()
    if os.environ["RANK"] == "1":
        data[5, 2] = torch.inf
    try:
        FeatureNormalizer(3).fit([data])
    except DataError as error:
        return str(error)
    return "nothing"
