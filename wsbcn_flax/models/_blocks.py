"""Residual blocks of two convolutions, with convolution and normalization injected."""

import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax

ModuleFactory = Callable[..., nn.Module]

# The authors' initialization (he et al., fan-out, not truncated).
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv3x3(conv: ModuleFactory, features: int, *, strides: int = 1, name: str) -> nn.Module:
    """A 3x3 convolution without bias, padded by one on every side as the authors' is."""
    return conv(
        features,
        (3, 3),
        strides=strides,
        padding=1,
        use_bias=False,
        kernel_init=kernel_init,
        name=name,
    )


def conv1x1(conv: ModuleFactory, features: int, *, strides: int = 1, name: str) -> nn.Module:
    """A 1x1 convolution without bias."""
    return conv(
        features, (1, 1), strides=strides, use_bias=False, kernel_init=kernel_init, name=name
    )


def bind_mode(norm: ModuleFactory, *, train: bool) -> ModuleFactory:
    """Tells a normalization the mode if it has one, so that any of Flax's can be injected.

    ``nn.BatchNorm`` and ``BatchChannelNorm`` take ``use_running_average``; ``nn.GroupNorm`` and
    ``nn.LayerNorm`` are the same in training and evaluation and do not.
    """
    if "use_running_average" in inspect.signature(norm).parameters:
        return functools.partial(norm, use_running_average=not train)
    return norm


class _ResidualBlock(nn.Module):
    """What the kinds of blocks share: their fields and the projection of the shortcut."""

    features: int
    conv: ModuleFactory
    norm: ModuleFactory
    strides: int = 1

    def _changes_shape(self, x: jax.Array) -> bool:
        return self.strides != 1 or x.shape[-1] != self.features

    def _project(self, x: jax.Array) -> jax.Array:
        conv = conv1x1(self.conv, self.features, strides=self.strides, name="shortcut_conv")
        return conv(x)


class BasicBlock(_ResidualBlock):
    """relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))), the last scale starting at zero.

    The shortcut is the identity, or a 1x1 convolution and a normalization where the stride or the
    number of features changes.

    Attributes:
        features: channels of the output.
        conv: makes a convolution, called like ``nn.Conv``.
        norm: makes a normalization in the right mode, called with ``name`` and ``scale_init``.
        strides: of the first convolution.

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

    # What the network around the blocks adds: this kind ends normalized.
    normalizes_output = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        shortcut = x
        if self._changes_shape(x):
            shortcut = self.norm(name="shortcut_norm")(self._project(x))
        y = conv3x3(self.conv, self.features, strides=self.strides, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv3x3(self.conv, self.features, name="conv2")(y)
        y = self.norm(name="norm2", scale_init=nn.initializers.zeros)(y)
        return nn.relu(shortcut + y)


class PreActBlock(_ResidualBlock):
    """shortcut(x) + conv2(relu(norm2(conv1(relu(norm1(x)))))).

    The shortcut is the identity, or a 1x1 convolution where the stride or the number of features
    changes. No scale starts at zero: behind norm2 stands a ReLU, whose gradient at zero is zero,
    and the branch would never learn.

    Attributes:
        features: channels of the output.
        conv: makes a convolution, called like ``nn.Conv``.
        norm: makes a normalization in the right mode, called with ``name``.
        strides: of the first convolution.

    References:
        He et al., Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import PreActBlock
        >>> block = PreActBlock(32, conv=nn.Conv, norm=nn.LayerNorm, strides=2)
        >>> y, _ = block.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 16)))
        >>> y.shape
        (1, 4, 4, 32)
    """

    normalizes_output = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H / strides, W / strides, features]."""
        shortcut = self._project(x) if self._changes_shape(x) else x
        y = nn.relu(self.norm(name="norm1")(x))
        y = conv3x3(self.conv, self.features, strides=self.strides, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        return shortcut + conv3x3(self.conv, self.features, name="conv2")(y)
