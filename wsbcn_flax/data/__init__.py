"""Datasets, transforms of examples, and batches made from them.

`load_split` finds a dataset on this machine, `train_batches` and `eval_batches` make batches from
it or from any other source of examples, and the transforms decode, crop, flip and normalize images.

Importing this package is cheap. The packages of the extra ``train`` (grain, tensorflow-datasets,
pillow) and OpenCV are imported when first used.
"""

from wsbcn_flax.data._augmentation import RandomCrop, RandomFlip, RandomResizedCrop
from wsbcn_flax.data._decoding import CentralCrop, DecodeImage
from wsbcn_flax.data._load import (
    DatasetNotFoundError,
    dataset_names,
    default_data_dir,
    load_split,
)
from wsbcn_flax.data._normalization import (
    IMAGENET_STATISTICS,
    ChannelStatistics,
    Normalize,
    channel_statistics,
)
from wsbcn_flax.data._pipeline import Source, eval_batches, train_batches
from wsbcn_flax.data._readers import DatasetFormatError
from wsbcn_flax.data._sources import EncodedSource, ImageSource

__all__ = [
    "IMAGENET_STATISTICS",
    "CentralCrop",
    "ChannelStatistics",
    "DatasetFormatError",
    "DatasetNotFoundError",
    "DecodeImage",
    "EncodedSource",
    "ImageSource",
    "Normalize",
    "RandomCrop",
    "RandomFlip",
    "RandomResizedCrop",
    "Source",
    "channel_statistics",
    "dataset_names",
    "default_data_dir",
    "eval_batches",
    "load_split",
    "train_batches",
]
