"""Densely connected networks (DenseNet-BC) for small images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.models._layers import (
    ModuleFactory,
    bind_mode,
    check_images,
    classify,
    make_conv,
    maker,
)


class _DenseLayer(nn.Module):
    """A dense layer: x with conv2(relu(norm2(conv1(relu(norm1(x)))))) appended as channels."""

    growth: int
    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm(name="norm1")(x))
        y = make_conv(self.conv, 4 * self.growth, 1, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = make_conv(self.conv, self.growth, 3, name="conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class _Transition(nn.Module):
    """A transition: halves the channels by a 1x1 convolution, the resolution by averaging."""

    conv: ModuleFactory
    norm: ModuleFactory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm(name="norm")(x))
        y = make_conv(self.conv, x.shape[-1] // 2, 1, name="conv")(y)
        return nn.avg_pool(y, (2, 2), strides=(2, 2))


class DenseNet(nn.Module):
    """DenseNet-BC: a 3x3 stem, three blocks of n dense layers, transitions between them, a head.

    The depth is 6n + 4: 10, 16, 22, 40, 100. A dense layer appends ``growth`` channels to its
    input. It applies norm, ReLU, a 1x1 convolution to 4 * growth channels (B for bottleneck), norm,
    ReLU and a 3x3 convolution. A transition applies norm and ReLU, then halves the channels (C for
    compression) and the resolution. The stem has 2 * growth channels; a norm and a ReLU end the
    last block. Initialization is he-normal with fan-out.

    ``DenseNetBC100_12`` is a partial of this class with depth 100 and growth 12. The largest number
    that divides all its numbers of channels is 6, so a normalization can have at most 6 groups.

    Submodules: ``stem_conv``, ``block{b}_layer{l}`` with ``norm1``, ``conv1``, ``norm2`` and
    ``conv2``, ``transition{b}`` with ``norm`` and ``conv``, ``last_norm`` and ``head``.

    Attributes:
        depth: Number of layers with weights, 6n + 4.
        growth: Number of channels that each dense layer appends.
        num_classes: Number of classes; None returns the features of every stage, without a head.
        conv: Maker of a convolution: ``nn.Conv``, ``WSConv`` or a partial of them.
        norm: Maker of a normalization: ``nn.BatchNorm``, ``nn.GroupNorm``, ``BatchChannelNorm`` or
            a partial of them. If it takes ``use_running_average``, the network sets it.
        dtype: Computation dtype; the head's logits are float32 or wider.

    Raises:
        TypeError: If the images are not floating-point.
        ValueError: For a depth that is not 6n + 4, a growth below 1, or images that are not
            [B, H, W, C] or smaller than 4x4.

    References:
        Huang et al., Densely Connected Convolutional Networks, https://arxiv.org/abs/1608.06993

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from wsbcn_flax import BatchChannelNorm, WSConv
        >>> from wsbcn_flax.models import DenseNetBC100_12
        >>> model = DenseNetBC100_12(
        ...     conv=WSConv, norm=functools.partial(BatchChannelNorm, num_groups=6))
        >>> init = functools.partial(model.init, train=False)
        >>> shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
        >>> shapes["params"]["head"]["kernel"].shape
        (342, 10)
    """

    depth: int
    growth: int
    num_classes: int | None = 10
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(
                f"depth must be 6n + 4 (10, 16, 22, 40, 100, ...), received {self.depth}."
            )
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1, received {self.growth}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array | tuple[jax.Array, ...]:
        """Computes logits [B, num_classes] of floating-point images [B, H, W, C].

        If ``num_classes`` is None, it returns a tuple of every stage's features instead.

        Args:
            images: Normalized images, at least 4 high and wide.
            train: Whether normalizations use and update training statistics; then apply with
                ``mutable=["batch_stats"]``.
        """
        check_images(images, halvings=2)
        conv = maker("conv", self.conv, dtype=self.dtype)
        norm = bind_mode(maker("norm", self.norm, dtype=self.dtype), train=train)
        x = make_conv(conv, 2 * self.growth, 3, name="stem_conv")(images)
        outputs = []
        for block in (1, 2, 3):
            if block > 1:
                x = _Transition(conv=conv, norm=norm, name=f"transition{block - 1}")(x)
            for layer in range(1, (self.depth - 4) // 6 + 1):
                name = f"block{block}_layer{layer}"
                x = _DenseLayer(self.growth, conv=conv, norm=norm, name=name)(x)
            outputs.append(x)
        x = nn.relu(norm(name="last_norm")(x))
        if self.num_classes is None:
            return (*outputs[:-1], x)
        return classify(x, self.num_classes)


DenseNetBC100_12 = functools.partial(DenseNet, depth=100, growth=12)
