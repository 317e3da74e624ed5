"""Image classification data: named sets loaded into memory, and batches made from them.

A leaf of the package. Importing it is cheap: tensorflow-datasets, grain and pillow are imported
when first used. The tensorflow-datasets builders are in `wsbcn_flax.data.builders`.
"""

from wsbcn_flax.data._augment import Augment
from wsbcn_flax.data._batches import eval_batches, train_batches
from wsbcn_flax.data._idx import IdxFormatError
from wsbcn_flax.data._load import dataset_names, load_split
from wsbcn_flax.data._locate import DatasetNotFoundError, default_data_dir
from wsbcn_flax.data._normalize import ChannelStatistics, channel_statistics
from wsbcn_flax.data._split import ImageSplit

__all__ = [
    "Augment",
    "ChannelStatistics",
    "DatasetNotFoundError",
    "IdxFormatError",
    "ImageSplit",
    "channel_statistics",
    "dataset_names",
    "default_data_dir",
    "eval_batches",
    "load_split",
    "train_batches",
]
