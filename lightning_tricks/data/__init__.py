"""Loaders that resume exactly and read the user's files."""

from lightning_tricks.data.augmentations import Augmentation, BackTranslation, MaskedReplacement, Paraphrase
from lightning_tricks.data.augmenting import AugmentReport, augment
from lightning_tricks.data.bucketing import bucketed
from lightning_tricks.data.class_balance import ClassBalancedSampler
from lightning_tricks.data.class_counts import count_classes
from lightning_tricks.data.collating import DynamicPaddingCollator
from lightning_tricks.data.length_buckets import LengthBucketSampler
from lightning_tricks.data.lengths import measure_lengths
from lightning_tricks.data.loader import TricksDataLoader
from lightning_tricks.data.normalizing import FeatureNormalizer
from lightning_tricks.data.packing import PackedDataset, SequencePacker
from lightning_tricks.data.reporting import DataReport, report

__all__ = [
    "AugmentReport",
    "Augmentation",
    "BackTranslation",
    "ClassBalancedSampler",
    "DataReport",
    "DynamicPaddingCollator",
    "FeatureNormalizer",
    "LengthBucketSampler",
    "MaskedReplacement",
    "PackedDataset",
    "Paraphrase",
    "SequencePacker",
    "TricksDataLoader",
    "augment",
    "bucketed",
    "count_classes",
    "measure_lengths",
    "report",
]
