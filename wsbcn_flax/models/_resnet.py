"""Residual networks for ImageNet."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from wsbcn_flax.models._blocks import BasicBlock, Bottleneck
from wsbcn_flax.models._layers import ModuleFactory, bind_mode, check_images, classify, make_conv
from wsbcn_flax.models._stages import probe, residual_stages


class ResNet(nn.Module):
    """The ImageNet residual network: 7x7 stem, max pooling, stages of blocks, mean, a head.

    ``ResNet18``, ``ResNet34``, ``ResNet50``, ``ResNet101``, ``ResNet152``, ``ResNeXt50_32x4d`` and
    ``ResNeXt101_32x4d`` are partials of this class: ``ResNet50(conv=WSConv, norm=...)``. The stem
    and the pooling halve the resolution each, and so does every stage after the first, which also
    doubles the channels. Bottlenecks stride in their 3x3 convolution. Initialization is the
    authors': he-normal with fan-out, and the last normalization scale of each residual branch at
    zero. Padding is PyTorch's, so that its checkpoints compute the same here.

    Submodules: ``stem_conv``, ``stem_norm``, ``stage{s}_block{b}`` with ``conv{i}``, ``norm{i}``,
    ``shortcut_conv`` and ``shortcut_norm``, and ``head``.

    Attributes:
        stage_sizes: blocks in each stage.
        features: channels that the first stage's blocks return.
        block: ``BasicBlock``, ``Bottleneck``, their pre-activation siblings, a partial of one, or
            any of these under ``nn.remat``.
        num_classes: features of the head.
        stem_features: channels of the stem.
        conv: makes a convolution: ``nn.Conv``, ``WSConv`` or a partial of them.
        norm: makes a normalization: ``nn.BatchNorm``, ``nn.GroupNorm``, ``BatchChannelNorm`` or a
            partial of them. It is told the mode where it takes ``use_running_average``.
        dtype: of the computation; parameters, and the head's logits, are float32 or wider.

    Raises:
        TypeError: for images that are not floating-point.
        ValueError: for a stage without blocks, features that the block cannot have, or images that
            are not [B, H, W, C].

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385;
        Xie et al., Aggregated Residual Transformations for Deep Neural Networks,
        https://arxiv.org/abs/1611.05431; Goyal et al., Accurate, Large Minibatch SGD,
        https://arxiv.org/abs/1706.02677, for the zero scales and the stride's place

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from wsbcn_flax import BatchChannelNorm, WSConv
        >>> from wsbcn_flax.models import ResNet50
        >>> model = ResNet50(conv=WSConv, norm=functools.partial(BatchChannelNorm, num_groups=32))
        >>> init = functools.partial(model.init, train=False)
        >>> shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
        >>> shapes["params"]["head"]["kernel"].shape
        (2048, 1000)
    """

    stage_sizes: Sequence[int]
    features: int
    block: ModuleFactory
    num_classes: int = 1000
    stem_features: int = 64
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(
                f"Each stage must have at least one block, received stage_sizes={self.stage_sizes}."
            )
        probe(self.block, self.features)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits [B, num_classes] of floating-point images [B, H, W, C].

        Args:
            images: normalized images.
            train: whether normalizations use and update training statistics; then apply with
                ``mutable=["batch_stats"]``.
        """
        check_images(images)
        conv = functools.partial(self.conv, dtype=self.dtype)
        norm = bind_mode(functools.partial(self.norm, dtype=self.dtype), train=train)
        x = residual_stages(
            make_conv(conv, self.stem_features, 7, strides=2, name="stem_conv")(images),
            stage_sizes=self.stage_sizes,
            features=self.features,
            block=functools.partial(self.block, conv=conv, norm=norm),
            norm=norm,
            pool=_max_pool,
        )
        return classify(x, self.num_classes)


def _max_pool(x: jax.Array) -> jax.Array:
    padding: Any = ((1, 1), (1, 1))  # Of minus infinity; Flax types padding as str alone.
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


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
