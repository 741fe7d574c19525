"""Loaders that resume exactly and read the user's files, also those larger than memory."""

from lightning_tricks.data.augmentations import Augmentation, BackTranslation, MaskedReplacement, Paraphrase
from lightning_tricks.data.augmenting import AugmentReport, augment
from lightning_tricks.data.bucketing import bucketed
from lightning_tricks.data.class_balance import ClassBalancedSampler
from lightning_tricks.data.class_counts import count_classes
from lightning_tricks.data.collating import DynamicPaddingCollator
from lightning_tricks.data.iterables import IterableSource
from lightning_tricks.data.length_buckets import LengthBucketSampler
from lightning_tricks.data.lengths import measure_lengths
from lightning_tricks.data.lit_data import LitDataSource
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.data.normalizing import FeatureNormalizer
from lightning_tricks.data.packing import PackedDataset, SequencePacker
from lightning_tricks.data.parquet import ParquetSource
from lightning_tricks.data.reporting import DataReport, report
from lightning_tricks.data.sources import Block, ShardedSource
from lightning_tricks.data.streaming import StreamingSampler

__all__ = [
    "AugmentReport",
    "Augmentation",
    "BackTranslation",
    "Block",
    "ClassBalancedSampler",
    "DataReport",
    "DynamicPaddingCollator",
    "FeatureNormalizer",
    "IterableSource",
    "LengthBucketSampler",
    "LitDataSource",
    "MaskedReplacement",
    "PackedDataset",
    "Paraphrase",
    "ParquetSource",
    "SequencePacker",
    "ShardedSource",
    "StreamingSampler",
    "TricksDataLoader",
    "augment",
    "bucketed",
    "count_classes",
    "measure_lengths",
    "report",
]
