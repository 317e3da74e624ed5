"""Weight Standardization and Batch-Channel Normalization for Flax.

This module exports the names for composing models. Import ``wsbcn_flax.models``,
``wsbcn_flax.training`` and ``wsbcn_flax.data`` by name, so that the layers stay cheap to import.
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
