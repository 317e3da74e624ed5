"""Residual networks for ImageNet."""

import functools
from collections.abc import Sequence

import jax
from flax import nnx

from wsbcn_flax.models._layers import check_images
from wsbcn_flax.models._resnet import check_stage_sizes, max_pool
from wsbcn_flax.nnx.models._blocks import BasicBlock, Bottleneck
from wsbcn_flax.nnx.models._layers import LayerFactory, Stages, make_conv


class ResNet(Stages):
    """The ImageNet residual network: a 7x7 stem, max pooling, stages of blocks, mean, a head.

    ``ResNet18``, ``ResNet34``, ``ResNet50``, ``ResNet101``, ``ResNet152``, ``ResNeXt50_32x4d`` and
    ``ResNeXt101_32x4d`` are partials of this class. It is the twin of ``wsbcn_flax.models.ResNet``
    without dilations, frozen stages and padded images. ``load_variables`` takes the twin's
    variables, and so those that ``import_checkpoint`` returns. ``train()`` and ``eval()`` set the
    mode.

    Args:
        stage_sizes: Number of blocks in each stage.
        features: Number of channels that the first stage's blocks return.
        block: Class of the blocks, ``BasicBlock``, ``Bottleneck`` or a partial of one.
        in_features: Number of channels of the images.
        num_classes: Number of classes; None returns the features of every stage, without a head.
        stem_features: Number of channels of the stem.
        conv: Maker of a convolution: ``nnx.Conv``, ``WSConv`` or a partial of them.
        norm: Maker of a normalization: ``nnx.BatchNorm``, ``nnx.GroupNorm``, ``BatchChannelNorm``
            or a partial of them.
        dtype: Computation dtype; the head's logits are float32 or wider.
        rngs: Random streams.

    Raises:
        TypeError: When called, if the images are not floating-point.
        ValueError: For a stage without blocks, or features that the block cannot have. When called,
            for images that are not [B, H, W, C].

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385;
        Xie et al., Aggregated Residual Transformations for Deep Neural Networks,
        https://arxiv.org/abs/1611.05431

    Example:
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import BatchChannelNorm, WSConv
        >>> from wsbcn_flax.nnx.models import ResNet50
        >>> def make():
        ...     return ResNet50(conv=WSConv, norm=BatchChannelNorm, rngs=nnx.Rngs(0))
        >>> nnx.eval_shape(make).head.kernel.shape
        (2048, 1000)
    """

    def __init__(
        self,
        *,
        stage_sizes: Sequence[int],
        features: int,
        block: LayerFactory,
        in_features: int = 3,
        num_classes: int | None = 1000,
        stem_features: int = 64,
        conv: LayerFactory = nnx.Conv,
        norm: LayerFactory = nnx.BatchNorm,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        check_stage_sizes(stage_sizes)
        conv, norm = (functools.partial(layer, dtype=dtype) for layer in (conv, norm))
        self.stem_conv = make_conv(conv, in_features, stem_features, 7, strides=2, rngs=rngs)
        self.stem_norm = norm(stem_features, rngs=rngs)
        super().__init__(
            stage_sizes,
            stem_features,
            features,
            block=block,
            num_classes=num_classes,
            conv=conv,
            norm=norm,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """Computes logits [B, num_classes] of floating-point images [B, H, W, in_features].

        Without classes it returns a tuple of every stage's features, from [B, H / 4, W / 4,
        features] on.
        """
        check_images(images)
        x = nnx.relu(self.stem_norm(self.stem_conv(images)))
        return self.after_stem(max_pool(x))


_BasicResNet = functools.partial(ResNet, features=64, block=BasicBlock)
_BottleneckResNet = functools.partial(ResNet, features=256, block=Bottleneck)
_ResNeXt = functools.partial(
    ResNet, features=256, block=functools.partial(Bottleneck, groups=32, base_width=4)
)

ResNet18 = functools.partial(_BasicResNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = functools.partial(_BasicResNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = functools.partial(_BottleneckResNet, stage_sizes=(3, 4, 6, 3))
ResNet101 = functools.partial(_BottleneckResNet, stage_sizes=(3, 4, 23, 3))
ResNet152 = functools.partial(_BottleneckResNet, stage_sizes=(3, 8, 36, 3))
ResNeXt50_32x4d = functools.partial(_ResNeXt, stage_sizes=(3, 4, 6, 3))
ResNeXt101_32x4d = functools.partial(_ResNeXt, stage_sizes=(3, 4, 23, 3))
