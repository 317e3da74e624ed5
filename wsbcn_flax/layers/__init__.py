"""Linen modules that own parameters and running statistics and call ``wsbcn_flax.ops``."""

from wsbcn_flax.layers._batch_channel_norm import BatchChannelNorm
from wsbcn_flax.layers._channel_norm import ChannelNorm
from wsbcn_flax.layers._ws import WSConv, WSConvTranspose, WSDense

__all__ = ["BatchChannelNorm", "ChannelNorm", "WSConv", "WSConvTranspose", "WSDense"]
