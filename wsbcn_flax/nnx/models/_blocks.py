"""Residual blocks of two or three convolutions, each written out as its equation."""

from typing import ClassVar

import jax
from flax import nnx

from wsbcn_flax.models._blocks import bottleneck_width
from wsbcn_flax.nnx.models._layers import LayerFactory, make_conv

zeros = nnx.initializers.zeros


class BasicBlock(nnx.Module):
    """A block relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))).

    The scale of ``norm2`` starts at zero. The shortcut is the identity, or a 1x1 convolution and a
    normalization where the stride or the number of features changes. The block is the twin of
    ``wsbcn_flax.models.BasicBlock``.

    Args:
        in_features: Number of input channels.
        features: Number of output channels.
        conv: Maker of a convolution, called like ``nnx.Conv``.
        norm: Maker of a normalization, called with a number of channels and ``rngs``, and
            ``scale_init`` for the last one.
        strides: Strides of the first convolution.
        rngs: Random streams.

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx.models import BasicBlock
        >>> rngs = nnx.Rngs(0)
        >>> block = BasicBlock(16, 32, conv=nnx.Conv, norm=nnx.BatchNorm, strides=2, rngs=rngs)
        >>> block(jnp.ones((1, 8, 8, 16))).shape
        (1, 4, 4, 32)
    """

    depth: ClassVar[int] = 2

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        conv: LayerFactory,
        norm: LayerFactory,
        strides: int = 1,
        rngs: nnx.Rngs,
    ):
        self.conv1 = make_conv(conv, in_features, features, 3, strides=strides, rngs=rngs)
        self.norm1 = norm(features, rngs=rngs)
        self.conv2 = make_conv(conv, features, features, 3, rngs=rngs)
        self.norm2 = norm(features, scale_init=zeros, rngs=rngs)
        self.projects = strides != 1 or in_features != features
        if self.projects:
            self.shortcut_conv = make_conv(
                conv, in_features, features, 1, strides=strides, rngs=rngs
            )
            self.shortcut_norm = norm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, in_features] to [B, H / strides, W / strides, features]."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return nnx.relu(x + y)


class Bottleneck(nnx.Module):
    """A block relu(shortcut(x) + norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x))))))))).

    The convolutions are 1x1, 3x3 and 1x1. The 3x3 convolution has the stride, and
    features / 4 * base_width / 64 channels in each of its groups. The scale of ``norm3`` starts at
    zero. The shortcut is ``BasicBlock``'s. The block is the twin of
    ``wsbcn_flax.models.Bottleneck``.

    Args:
        in_features: Number of input channels.
        features: Number of output channels.
        conv: Maker of a convolution, as in ``BasicBlock``.
        norm: Maker of a normalization, as in ``BasicBlock``.
        strides: Strides of the 3x3 convolution.
        groups: Number of groups of the 3x3 convolution; more than one makes it ResNeXt's block.
        base_width: Number of channels in a group of the 3x3 convolution if ``features`` is 256.
        rngs: Random streams.

    Raises:
        ValueError: If a group's number of channels is not a whole number.

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385;
        Xie et al., Aggregated Residual Transformations for Deep Neural Networks,
        https://arxiv.org/abs/1611.05431

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx.models import Bottleneck
        >>> block = Bottleneck(64, 256, conv=nnx.Conv, norm=nnx.BatchNorm, rngs=nnx.Rngs(0))
        >>> block(jnp.ones((1, 8, 8, 64))).shape
        (1, 8, 8, 256)
    """

    depth: ClassVar[int] = 3

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        conv: LayerFactory,
        norm: LayerFactory,
        strides: int = 1,
        groups: int = 1,
        base_width: int = 64,
        rngs: nnx.Rngs,
    ):
        width = bottleneck_width(features, base_width=base_width, groups=groups)
        self.conv1 = make_conv(conv, in_features, width, 1, rngs=rngs)
        self.norm1 = norm(width, rngs=rngs)
        self.conv2 = make_conv(conv, width, width, 3, strides=strides, groups=groups, rngs=rngs)
        self.norm2 = norm(width, rngs=rngs)
        self.conv3 = make_conv(conv, width, features, 1, rngs=rngs)
        self.norm3 = norm(features, scale_init=zeros, rngs=rngs)
        self.projects = strides != 1 or in_features != features
        if self.projects:
            self.shortcut_conv = make_conv(
                conv, in_features, features, 1, strides=strides, rngs=rngs
            )
            self.shortcut_norm = norm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, in_features] to [B, H / strides, W / strides, features]."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.projects:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return nnx.relu(x + y)
