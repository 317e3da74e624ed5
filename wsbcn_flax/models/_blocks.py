"""Residual blocks of two or three convolutions, activated after the sum or before each convolution.

Each block is written out like its equation. A network reads two class attributes of its block,
``depth`` and ``preactivation``, to lay out the layers around the blocks.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax

from wsbcn_flax.models._layers import ModuleFactory, make_conv

no_dropout = functools.partial(nn.Dropout, rate=0.0, deterministic=True)
zeros = nn.initializers.zeros


def block_class(block: ModuleFactory) -> Any:
    """Returns the class of a block, which may be a partial of a class or under ``nn.remat``."""
    while isinstance(block, functools.partial):
        block = block.func
    return block


class BasicBlock(nn.Module):
    """A block of two 3x3 convolutions: relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))).

    The scale of norm2 starts at zero. The shortcut is the identity, or a 1x1 convolution and a
    normalization where the resolution or the number of channels changes.

    Attributes:
        features: Number of output channels.
        conv: Maker of a convolution, called like ``nn.Conv``.
        norm: Maker of a normalization, already told whether it trains or evaluates; called with
            ``name`` and ``scale_init``.
        strides: Strides of the first convolution.
        dilation: Dilation of the 3x3 convolutions.
        first_dilation: Dilation of the first 3x3 convolution; defaults to ``dilation``.
        dropout: Maker of a dropout, already told whether it trains or evaluates; called with
            ``name``. Dropout comes before the last convolution; there is none by default.

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

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides: int = 1
    dilation: int = 1
    first_dilation: int | None = None
    dropout: ModuleFactory = no_dropout

    depth: ClassVar[int] = 2
    preactivation: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        conv3 = functools.partial(make_conv, self.conv, self.features, 3)
        first = self.first_dilation or self.dilation
        y = conv3(strides=self.strides, dilation=first, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.dropout(name="dropout")(y)
        y = conv3(dilation=self.dilation, name="conv2")(y)
        y = self.norm(name="norm2", scale_init=zeros)(y)
        if changes_shape(self, x):
            x = project(self, x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """A block of a 1x1, a 3x3 and a 1x1 convolution, activated after the sum.

    It computes relu(shortcut(x) + norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x))))))))). The 3x3
    convolution has the stride, and features / 4 * base_width / 64 channels in each of its groups.
    The scale of norm3 starts at zero. The shortcut is the same as in ``BasicBlock``.

    Attributes:
        features: Number of output channels.
        conv, norm, dropout: Makers of layers, as in ``BasicBlock``.
        strides: Strides of the 3x3 convolution.
        dilation, first_dilation: Dilation of the 3x3 convolution; ``first_dilation`` overrides
            ``dilation`` unless it is None.
        groups: Number of groups of the 3x3 convolution; more than one gives ResNeXt's block.
        base_width: Number of channels in a group of the 3x3 convolution if ``features`` is 256.

    Raises:
        ValueError: When called, if the number of channels in a group is not a whole number.

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

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides: int = 1
    dilation: int = 1
    first_dilation: int | None = None
    dropout: ModuleFactory = no_dropout
    groups: int = 1
    base_width: int = 64

    depth: ClassVar[int] = 3
    preactivation: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        width = bottleneck_width(self.features, base_width=self.base_width, groups=self.groups)
        y = make_conv(self.conv, width, 1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = grouped_conv(self, width)(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.dropout(name="dropout")(y)
        y = make_conv(self.conv, self.features, 1, name="conv3")(y)
        y = self.norm(name="norm3", scale_init=zeros)(y)
        if changes_shape(self, x):
            x = project(self, x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class PreActBlock(nn.Module):
    """A block of two 3x3 convolutions: shortcut(x) + conv2(relu(norm2(conv1(relu(norm1(x)))))).

    The shortcut is the identity, or a 1x1 convolution where the resolution or the number of
    channels changes. No scale starts at zero: a ReLU follows norm2, its gradient at zero is zero,
    and the branch would never learn.

    Attributes:
        features: Number of output channels.
        conv: Maker of a convolution, called like ``nn.Conv``.
        norm: Maker of a normalization, already told whether it trains or evaluates; called with
            ``name``.
        strides: Strides of the first convolution.
        dilation: Dilation of the 3x3 convolutions.
        first_dilation: Dilation of the first 3x3 convolution; defaults to ``dilation``.
        dropout: Maker of a dropout, already told whether it trains or evaluates; called with
            ``name``. Dropout comes before the last convolution; there is none by default.
        activated_shortcut: Whether the shortcut's convolution takes relu(norm1(x)), as in wide
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

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides: int = 1
    dilation: int = 1
    first_dilation: int | None = None
    dropout: ModuleFactory = no_dropout
    activated_shortcut: bool = False

    depth: ClassVar[int] = 2
    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        conv3 = functools.partial(make_conv, self.conv, self.features, 3)
        first = self.first_dilation or self.dilation
        y = nn.relu(self.norm(name="norm1")(x))
        if changes_shape(self, x):
            x = project(self, y if self.activated_shortcut else x)
        y = conv3(strides=self.strides, dilation=first, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.dropout(name="dropout")(y)
        y = conv3(dilation=self.dilation, name="conv2")(y)
        return x + y


class PreActBottleneck(nn.Module):
    """A block of a 1x1, a 3x3 and a 1x1 convolution, activated before each of them.

    It computes shortcut(x) + conv3(relu(norm3(conv2(relu(norm2(conv1(relu(norm1(x))))))))). The
    numbers of channels are those of ``Bottleneck``, the shortcut is that of ``PreActBlock``.

    Attributes:
        features: Number of output channels.
        conv, norm, dropout, activated_shortcut: As in ``PreActBlock``.
        strides: Strides of the 3x3 convolution.
        dilation, first_dilation: As in ``Bottleneck``.
        groups, base_width: As in ``Bottleneck``.

    Raises:
        ValueError: When called, if the number of channels in a group is not a whole number.

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

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides: int = 1
    dilation: int = 1
    first_dilation: int | None = None
    dropout: ModuleFactory = no_dropout
    activated_shortcut: bool = False
    groups: int = 1
    base_width: int = 64

    depth: ClassVar[int] = 3
    preactivation: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        width = bottleneck_width(self.features, base_width=self.base_width, groups=self.groups)
        y = nn.relu(self.norm(name="norm1")(x))
        if changes_shape(self, x):
            x = project(self, y if self.activated_shortcut else x)
        y = make_conv(self.conv, width, 1, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = grouped_conv(self, width)(y)
        y = nn.relu(self.norm(name="norm3")(y))
        y = self.dropout(name="dropout")(y)
        y = make_conv(self.conv, self.features, 1, name="conv3")(y)
        return x + y


def changes_shape(block: Any, x: jax.Array) -> bool:
    """Whether the shortcut must change the resolution or the number of channels."""
    return block.strides != 1 or x.shape[-1] != block.features


def project(block: Any, x: jax.Array) -> jax.Array:
    """Applies the 1x1 convolution of the shortcut."""
    conv = make_conv(block.conv, block.features, 1, strides=block.strides, name="shortcut_conv")
    return conv(x)


def bottleneck_width(features: int, *, base_width: int, groups: int) -> int:
    """Returns the channels of the 3x3 convolution, features / 4 * base_width / 64 in each group."""
    if features <= 0 or features * base_width % 256:
        raise ValueError(
            "A bottleneck's features / 4 * base_width / 64 channels in each group must be a whole "
            f"number, received features={features}, base_width={base_width}. Use features "
            "divisible by 4 with base_width=64."
        )
    return features * base_width // 256 * groups


def grouped_conv(block: Any, width: int) -> nn.Module:
    """Makes the 3x3 convolution of a bottleneck, which has the stride."""
    return make_conv(
        block.conv,
        width,
        3,
        strides=block.strides,
        dilation=block.first_dilation or block.dilation,
        groups=block.groups,
        name="conv2",
    )
