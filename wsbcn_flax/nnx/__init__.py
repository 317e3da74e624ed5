"""Layers for Flax NNX over the same operations, and an adapter to train NNX models."""

from wsbcn_flax.nnx._batch_channel_norm import BatchChannelNorm
from wsbcn_flax.nnx._functional import Functional
from wsbcn_flax.nnx._variables import load_variables, to_variables
from wsbcn_flax.nnx._ws import WSConv, WSConvTranspose, WSLinear

__all__ = [
    "BatchChannelNorm",
    "Functional",
    "WSConv",
    "WSConvTranspose",
    "WSLinear",
    "load_variables",
    "to_variables",
]
