"""Image classification data: named sets, and batches made from them.

Small sets are loaded into memory (`load_split`, `train_batches`, `eval_batches`); the images of
ImageNet are decoded while they are used (`load_encoded_split`, `encoded_train_batches`,
`encoded_eval_batches`).

A leaf of the package. Importing it is cheap: tensorflow-datasets, grain, pillow and OpenCV are
imported when first used. The tensorflow-datasets builders are in `wsbcn_flax.data.builders`.
"""

from wsbcn_flax.data._augment import Augment
from wsbcn_flax.data._batches import eval_batches, train_batches
from wsbcn_flax.data._cifar import CifarFormatError
from wsbcn_flax.data._crops import eval_crop
from wsbcn_flax.data._encoded_batches import encoded_eval_batches, encoded_train_batches
from wsbcn_flax.data._encoded_split import EncodedSplit
from wsbcn_flax.data._idx import IdxFormatError
from wsbcn_flax.data._load import dataset_names, load_split
from wsbcn_flax.data._load_encoded import load_encoded_split
from wsbcn_flax.data._locate import DatasetNotFoundError, default_data_dir
from wsbcn_flax.data._normalize import IMAGENET_STATISTICS, ChannelStatistics, channel_statistics
from wsbcn_flax.data._split import ImageSplit

__all__ = [
    "IMAGENET_STATISTICS",
    "Augment",
    "ChannelStatistics",
    "CifarFormatError",
    "DatasetNotFoundError",
    "EncodedSplit",
    "IdxFormatError",
    "ImageSplit",
    "channel_statistics",
    "dataset_names",
    "default_data_dir",
    "encoded_eval_batches",
    "encoded_train_batches",
    "eval_batches",
    "eval_crop",
    "load_encoded_split",
    "load_split",
    "train_batches",
]
