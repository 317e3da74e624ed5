"""Residual blocks, two convolutions or three, activated after the sum or before each convolution.

Each public block is one of two orders joined with one of two branches; nothing is written twice.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax

from wsbcn_flax.models._layers import ModuleFactory, make_conv


class _ResidualBlock(nn.Module):
    """What all blocks share: their fields and the projection of the shortcut."""

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides: int = 1
    dropout: ModuleFactory = functools.partial(nn.Dropout, rate=0.0, deterministic=True)

    # What the network around the blocks reads, to lay its stages out.
    depth: ClassVar[int]
    preactivation: ClassVar[bool]

    def _convolutions(self) -> list[nn.Module]:
        """The branch's convolutions in order, from any number of channels to ``features``."""
        raise NotImplementedError

    def _changes_shape(self, x: jax.Array) -> bool:
        return self.strides != 1 or x.shape[-1] != self.features

    def _project(self, x: jax.Array) -> jax.Array:
        return make_conv(self.conv, self.features, 1, strides=self.strides, name="shortcut_conv")(x)


class _TwoConvolutions(_ResidualBlock):
    """The branch of basic blocks: 3x3, 3x3."""

    depth = 2

    def _convolutions(self) -> list[nn.Module]:
        return [
            make_conv(self.conv, self.features, 3, strides=self.strides, name="conv1"),
            make_conv(self.conv, self.features, 3, name="conv2"),
        ]


class _ThreeConvolutions(_ResidualBlock):
    """The branch of bottlenecks: 1x1 to fewer channels, 3x3 in groups, 1x1 back."""

    groups: int = 1
    base_width: int = 64

    depth = 3

    def __post_init__(self):
        if self.features <= 0 or self.features * self.base_width % 256:
            raise ValueError(
                "A bottleneck's features / 4 * base_width / 64 channels in each group must be a "
                f"whole number, received features={self.features}, base_width={self.base_width}. "
                "Use features divisible by 4 with base_width=64."
            )
        super().__post_init__()

    def _convolutions(self) -> list[nn.Module]:
        inner = self.features * self.base_width // 256 * self.groups
        return [
            make_conv(self.conv, inner, 1, name="conv1"),
            make_conv(self.conv, inner, 3, strides=self.strides, groups=self.groups, name="conv2"),
            make_conv(self.conv, self.features, 1, name="conv3"),
        ]


class _PostActivation(_ResidualBlock):
    """Convolution, normalization, ReLU; the last ReLU follows the sum."""

    preactivation = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        shortcut = x
        if self._changes_shape(x):
            shortcut = self.norm(name="shortcut_norm")(self._project(x))
        *convolutions, last = self._convolutions()
        for index, convolution in enumerate(convolutions, start=1):
            x = nn.relu(self.norm(name=f"norm{index}")(convolution(x)))
        x = last(self.dropout(name="dropout")(x))
        x = self.norm(name=f"norm{self.depth}", scale_init=nn.initializers.zeros)(x)
        return nn.relu(shortcut + x)


class _PreActivation(_ResidualBlock):
    """Normalization, ReLU, convolution; the shortcut runs through the network untouched."""

    activated_shortcut: bool = False

    preactivation = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        shortcut = x
        for index, convolution in enumerate(self._convolutions(), start=1):
            x = nn.relu(self.norm(name=f"norm{index}")(x))
            if index == 1 and self._changes_shape(shortcut):
                shortcut = self._project(x if self.activated_shortcut else shortcut)
            if index == self.depth:
                x = self.dropout(name="dropout")(x)
            x = convolution(x)
        return shortcut + x


class BasicBlock(_PostActivation, _TwoConvolutions):
    """relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))), the last scale starting at zero.

    The shortcut is the identity, or a 1x1 convolution and a normalization where the stride or the
    number of features changes.

    Attributes:
        features: channels of the output.
        conv: makes a convolution, called like ``nn.Conv``.
        norm: makes a normalization in the right mode, called with ``name`` and ``scale_init``.
        strides: of the first convolution.
        dropout: makes a dropout in the right mode, called with ``name``; before the last
            convolution. None by default.

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import BasicBlock
        >>> block = BasicBlock(16, conv=nn.Conv, norm=nn.LayerNorm)
        >>> y, _ = block.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 16)))
        >>> y.shape
        (1, 8, 8, 16)
    """


class Bottleneck(_PostActivation, _ThreeConvolutions):
    """relu(shortcut(x) + norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x)))))))), 1x1, 3x3, 1x1.

    The 3x3 convolution has features / 4 * base_width / 64 channels in each of its groups, and the
    stride. The last scale starts at zero. The shortcut is ``BasicBlock``'s.

    Attributes:
        features: channels of the output.
        conv, norm, dropout: as in ``BasicBlock``.
        strides: of the 3x3 convolution.
        groups: of the 3x3 convolution; more than one is ResNeXt's block.
        base_width: channels of a group of the 3x3 convolution where features is 256.

    Raises:
        ValueError: if a group's number of channels is not a whole number.

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385;
        Xie et al., Aggregated Residual Transformations for Deep Neural Networks,
        https://arxiv.org/abs/1611.05431

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import Bottleneck
        >>> block = Bottleneck(256, conv=nn.Conv, norm=nn.LayerNorm, groups=32, base_width=4)
        >>> shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.ones((1, 8, 8, 64)))
        >>> shapes["params"]["conv2"]["kernel"].shape
        (3, 3, 4, 128)
    """


class PreActBlock(_PreActivation, _TwoConvolutions):
    """shortcut(x) + conv2(relu(norm2(conv1(relu(norm1(x)))))).

    The shortcut is the identity, or a 1x1 convolution where the stride or the number of features
    changes. No scale starts at zero: behind norm2 stands a ReLU, whose gradient at zero is zero,
    and the branch would never learn.

    Attributes:
        features: channels of the output.
        conv: makes a convolution, called like ``nn.Conv``.
        norm: makes a normalization in the right mode, called with ``name``.
        strides: of the first convolution.
        dropout: makes a dropout in the right mode, called with ``name``; before the last
            convolution. None by default.
        activated_shortcut: whether the shortcut's convolution takes relu(norm1(x)), as in wide
            residual networks, instead of x.

    References:
        He et al., Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027;
        Zagoruyko and Komodakis, Wide Residual Networks, https://arxiv.org/abs/1605.07146

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import PreActBlock
        >>> block = PreActBlock(32, conv=nn.Conv, norm=nn.LayerNorm, strides=2)
        >>> y, _ = block.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 16)))
        >>> y.shape
        (1, 4, 4, 32)
    """


class PreActBottleneck(_PreActivation, _ThreeConvolutions):
    """shortcut(x) + conv3(relu(norm3(conv2(relu(norm2(conv1(relu(norm1(x)))))))), 1x1, 3x3, 1x1.

    The channels are ``Bottleneck``'s, the shortcut is ``PreActBlock``'s.

    Attributes:
        features: channels of the output.
        conv, norm, dropout, activated_shortcut: as in ``PreActBlock``.
        strides: of the 3x3 convolution.
        groups, base_width: as in ``Bottleneck``.

    Raises:
        ValueError: if a group's number of channels is not a whole number.

    References:
        He et al., Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import PreActBottleneck
        >>> block = PreActBottleneck(32, conv=nn.Conv, norm=nn.LayerNorm, strides=2)
        >>> y, _ = block.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 16)))
        >>> y.shape
        (1, 4, 4, 32)
    """
