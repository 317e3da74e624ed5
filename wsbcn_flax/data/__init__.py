"""Datasets, transforms of examples, and batches made from them.

`load_split` finds a dataset on this machine. `train_batches` and `eval_batches` make batches from
it or from any other source of examples. The transforms decode, crop, flip and normalize images.
`load_coco` opens a dataset in COCO's format, and `CocoEvaluator` scores detections against it.

Importing this package is cheap. The packages of the extra ``train`` (grain, tensorflow-datasets,
pillow), OpenCV and pycocotools are imported when first used.
"""

from wsbcn_flax.data._augmentation import RandomCrop, RandomFlip, RandomResizedCrop
from wsbcn_flax.data._buckets import (
    COCO_BUCKETS,
    PadImage,
    bucketed_eval_batches,
    bucketed_train_batches,
    split_by_bucket,
)
from wsbcn_flax.data._coco import CocoImage, CocoSource, load_coco
from wsbcn_flax.data._coco_evaluation import CocoEvaluator
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
from wsbcn_flax.data._object_masks import RasterizeMasks, decode_rle, encode_rle
from wsbcn_flax.data._objects import (
    CAFFE_BGR_STATISTICS,
    DecodeAnnotatedImage,
    PadBoxes,
    RandomFlipObjects,
    ResizeShorter,
    ToBGR,
)
from wsbcn_flax.data._pipeline import Source, eval_batches, train_batches
from wsbcn_flax.data._readers import DatasetFormatError
from wsbcn_flax.data._sources import EncodedSource, ImageSource

__all__ = [
    "CAFFE_BGR_STATISTICS",
    "COCO_BUCKETS",
    "IMAGENET_STATISTICS",
    "CentralCrop",
    "ChannelStatistics",
    "CocoEvaluator",
    "CocoImage",
    "CocoSource",
    "DatasetFormatError",
    "DatasetNotFoundError",
    "DecodeAnnotatedImage",
    "DecodeImage",
    "EncodedSource",
    "ImageSource",
    "Normalize",
    "PadBoxes",
    "PadImage",
    "RandomCrop",
    "RandomFlip",
    "RandomFlipObjects",
    "RandomResizedCrop",
    "RasterizeMasks",
    "ResizeShorter",
    "Source",
    "ToBGR",
    "bucketed_eval_batches",
    "bucketed_train_batches",
    "channel_statistics",
    "dataset_names",
    "decode_rle",
    "default_data_dir",
    "encode_rle",
    "eval_batches",
    "load_coco",
    "load_split",
    "split_by_bucket",
    "train_batches",
]
