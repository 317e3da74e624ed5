"""Residual networks of three stages for small images."""

import functools

import jax
from flax import nnx

from wsbcn_flax.models._blocks import block_class
from wsbcn_flax.models._cifar_resnet import blocks_per_stage
from wsbcn_flax.models._layers import check_images
from wsbcn_flax.nnx.models._blocks import BasicBlock
from wsbcn_flax.nnx.models._layers import LayerFactory, Stages, make_conv


class CifarResNet(Stages):
    """The CIFAR residual network: a 3x3 stem, three stages of n blocks, average pooling, a head.

    It is the twin of ``wsbcn_flax.models.CifarResNet`` with activation after the sum and without
    dropout. ``load_variables`` takes the twin's variables. ``train()`` and ``eval()`` set the mode.

    Args:
        depth: Number of layers with weights, without shortcuts: 6n + 2, or 9n + 2 with bottlenecks.
        in_features: Number of channels of the images.
        num_classes: Number of classes; None returns the features of every stage, without a head.
        width: Number of channels of the stem.
        features: Number of channels that the first stage's blocks return; defaults to ``width``.
        stem_strides: Strides of the stem's convolution.
        block: Class of the blocks, ``BasicBlock``, ``Bottleneck`` or a partial of one.
        conv: Maker of a convolution: ``nnx.Conv``, ``WSConv`` or a partial of them.
        norm: Maker of a normalization: ``nnx.BatchNorm``, ``nnx.GroupNorm``, ``BatchChannelNorm``
            or a partial of them.
        dtype: Computation dtype; the head's logits are float32 or wider.
        rngs: Random streams.

    Raises:
        TypeError: When called, if the images are not floating-point.
        ValueError: For a depth that no whole number of blocks gives. When called, for images that
            are not [B, H, W, C].

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385

    Example:
        >>> import functools, jax.numpy as jnp
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import BatchChannelNorm, WSConv
        >>> from wsbcn_flax.nnx.models import CifarResNet
        >>> norm = functools.partial(BatchChannelNorm, num_groups=4)
        >>> model = CifarResNet(depth=8, width=8, conv=WSConv, norm=norm, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 16, 16, 3))).shape
        (2, 10)
    """

    def __init__(
        self,
        *,
        depth: int,
        in_features: int = 3,
        num_classes: int | None = 10,
        width: int = 16,
        features: int | None = None,
        stem_strides: int = 1,
        block: LayerFactory = BasicBlock,
        conv: LayerFactory = nnx.Conv,
        norm: LayerFactory = nnx.BatchNorm,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        conv, norm = (functools.partial(layer, dtype=dtype) for layer in (conv, norm))
        self.stem_conv = make_conv(conv, in_features, width, 3, strides=stem_strides, rngs=rngs)
        self.stem_norm = norm(width, rngs=rngs)
        super().__init__(
            (blocks_per_stage(depth, block_class(block).depth),) * 3,
            width,
            features or width,
            block=block,
            num_classes=num_classes,
            conv=conv,
            norm=norm,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """Computes logits [B, num_classes] of floating-point images [B, H, W, in_features].

        Without classes it returns a tuple of every stage's features, from [B, H, W, features] on.
        """
        check_images(images)
        return self.after_stem(nnx.relu(self.stem_norm(self.stem_conv(images))))
