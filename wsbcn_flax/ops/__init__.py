"""Pure functions of arrays: weight standardization, channel moments and normalizations."""

from wsbcn_flax.ops._batch_channel_norm import RunningStats, batch_channel_norm
from wsbcn_flax.ops._channel_norm import channel_norm
from wsbcn_flax.ops._moments import ChannelMoments, channel_moments
from wsbcn_flax.ops._rules import PRESETS, StandardizationRule
from wsbcn_flax.ops._weight_standardization import standardize

__all__ = [
    "PRESETS",
    "ChannelMoments",
    "RunningStats",
    "StandardizationRule",
    "batch_channel_norm",
    "channel_moments",
    "channel_norm",
    "standardize",
]
