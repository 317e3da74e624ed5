"""Residual networks of three stages for small images."""

import functools

import flax.linen as nn
import jax

from wsbcn_flax.models._blocks import (
    BasicBlock,
    Bottleneck,
    PreActBlock,
    PreActBottleneck,
    block_class,
)
from wsbcn_flax.models._layers import (
    ModuleFactory,
    bind_mode,
    check_images,
    classify,
    make_conv,
    maker,
)


class CifarResNet(nn.Module):
    """The CIFAR residual network: a 3x3 stem, three stages of n blocks, average pooling, a head.

    With blocks of two convolutions the depth is 6n + 2 (8, 14, 20, 32, 44, 56, 110). With
    bottlenecks it is 9n + 2 (11, 20, 29, 164). Stages have 1, 2 and 4 times the channels of the
    first stage; the second and third halve the resolution. The initialization is the authors':
    he-normal with fan-out, and the last normalization scale of each residual branch at zero.

    ``PreResNet110``, ``PreResNet164``, ``ResNeXt29_8x64d`` and ``WRN28_10`` are partials of this
    class, for CIFAR. The 28 of ``WRN28_10`` counts the three shortcut convolutions but not the
    head; its depth here is 26.

    Attributes:
        depth: Number of layers with weights, shortcuts not counted: 6n + 2 or 9n + 2.
        num_classes: Number of classes; None returns the features of every stage, without a head.
        width: Number of channels of the stem.
        features: Number of channels that the first stage's blocks return; defaults to ``width``.
        stem_strides: Strides of the stem's convolution; 2 suits images of coarse detail, such as
            MNIST's, at a quarter of the cost.
        dropout_rate: Dropout rate in each block before its last convolution; above 0, training
            needs ``rngs={"dropout": key}``.
        block: Class of the blocks: ``BasicBlock``, ``PreActBlock``, ``Bottleneck``,
            ``PreActBottleneck``, a partial of one, or any of these under ``nn.remat``.
        conv: Maker of a convolution: ``nn.Conv``, ``WSConv`` or a partial of them.
        norm: Maker of a normalization: ``nn.BatchNorm``, ``nn.GroupNorm``, ``BatchChannelNorm`` or
            a partial of them. If it takes ``use_running_average``, the network sets it.
        dtype: Computation dtype; the head's logits are float32 or wider.

    Raises:
        TypeError: If the images are not floating-point.
        ValueError: For a depth that is not 6n + 2 (bottlenecks: 9n + 2), a dropout rate outside
            [0, 1), or images that are not [B, H, W, C].

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385;
        He et al., Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027;
        Xie et al., Aggregated Residual Transformations for Deep Neural Networks,
        https://arxiv.org/abs/1611.05431; Zagoruyko and Komodakis, Wide Residual Networks,
        https://arxiv.org/abs/1605.07146

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from wsbcn_flax import BatchChannelNorm, WSConv
        >>> from wsbcn_flax.models import CifarResNet
        >>> model = CifarResNet(depth=8, width=8, conv=WSConv,
        ...                     norm=functools.partial(BatchChannelNorm, num_groups=4))
        >>> images = jnp.ones((2, 16, 16, 3))
        >>> variables = model.init(jax.random.key(0), images, train=False)
        >>> logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        >>> logits.shape
        (2, 10)
    """

    depth: int
    num_classes: int | None = 10
    width: int = 16
    features: int | None = None
    stem_strides: int = 1
    dropout_rate: float = 0.0
    block: ModuleFactory = BasicBlock
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        blocks_per_stage(self.depth, block_class(self.block).depth)
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must be in [0, 1), received {self.dropout_rate}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array | tuple[jax.Array, ...]:
        """Computes logits [B, num_classes] of floating-point images [B, H, W, C].

        If ``num_classes`` is None, it returns a tuple of every stage's features instead, starting
        with [B, H, W, features].

        Args:
            images: Normalized images.
            train: Whether normalizations use and update training statistics and dropout is active;
                then apply with ``mutable=["batch_stats"]``.
        """
        check_images(images)
        conv = maker("conv", self.conv, dtype=self.dtype)
        norm = bind_mode(maker("norm", self.norm, dtype=self.dtype), train=train)
        dropout = functools.partial(nn.Dropout, self.dropout_rate, deterministic=not train)
        kind = block_class(self.block)
        x = make_conv(conv, self.width, 3, strides=self.stem_strides, name="stem_conv")(images)
        if not kind.preactivation:
            x = nn.relu(norm(name="stem_norm")(x))
        outputs = []
        for stage in (1, 2, 3):
            for index in range(blocks_per_stage(self.depth, kind.depth)):
                x = self.block(
                    (self.features or self.width) * 2 ** (stage - 1),
                    conv=conv,
                    norm=norm,
                    strides=2 if stage > 1 and index == 0 else 1,
                    dropout=dropout,
                    name=f"stage{stage}_block{index + 1}",
                )(x)
            outputs.append(x)
        if kind.preactivation:
            x = nn.relu(norm(name="last_norm")(x))
        if self.num_classes is None:
            return (*outputs[:-1], x)
        return classify(x, self.num_classes)


def blocks_per_stage(depth: int, block_depth: int) -> int:
    """Returns the number of blocks in a stage; raises ValueError if it is not a whole number."""
    layers = 3 * block_depth
    if depth < layers + 2 or (depth - 2) % layers:
        examples = ", ".join(str(layers * n + 2) for n in (1, 2, 3, 4, 6, 9, 18))
        raise ValueError(f"depth must be {layers}n + 2 ({examples}, ...), received {depth}.")
    return (depth - 2) // layers


PreResNet110 = functools.partial(CifarResNet, depth=110, block=PreActBlock)
PreResNet164 = functools.partial(CifarResNet, depth=164, features=64, block=PreActBottleneck)
ResNeXt29_8x64d = functools.partial(
    CifarResNet,
    depth=29,
    width=64,
    features=256,
    block=functools.partial(Bottleneck, groups=8),
)
WRN28_10 = functools.partial(
    CifarResNet,
    depth=26,
    features=160,
    dropout_rate=0.3,
    block=functools.partial(PreActBlock, activated_shortcut=True),
)
