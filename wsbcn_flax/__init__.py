"""Weight Standardization and Batch-Channel Normalization for Flax.

The names here are for composing models; ``wsbcn_flax.models``, ``wsbcn_flax.training`` and
``wsbcn_flax.data`` are imported by name, so that importing the layers costs nothing more.
"""

from wsbcn_flax.layers import BatchChannelNorm, ChannelNorm, WSConv, WSConvTranspose, WSDense
from wsbcn_flax.ops import batch_channel_norm, standardize
from wsbcn_flax.transforms import WeightStandardization

__all__ = [
    "BatchChannelNorm",
    "ChannelNorm",
    "WSConv",
    "WSConvTranspose",
    "WSDense",
    "WeightStandardization",
    "batch_channel_norm",
    "standardize",
]
__version__ = "0.1.0"
