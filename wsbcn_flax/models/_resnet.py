"""Residual networks for ImageNet."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.models._blocks import BasicBlock, Bottleneck, block_class
from wsbcn_flax.models._layers import (
    ModuleFactory,
    bind_mode,
    check_images,
    classify,
    make_conv,
    maker,
)
from wsbcn_flax.models._padding import Padding


class ResNet(nn.Module):
    """The ImageNet residual network: 7x7 stem, max pooling, stages of blocks, mean, a head.

    ``ResNet18``, ``ResNet34``, ``ResNet50``, ``ResNet101``, ``ResNet152``, ``ResNeXt50_32x4d`` and
    ``ResNeXt101_32x4d`` are partials of this class: ``ResNet50(conv=WSConv, norm=...)``. The stem,
    the pooling and every stage after the first each halve the resolution; those stages also double
    the channels. Bottlenecks stride in their 3x3 convolution. The initialization is the authors':
    he-normal with fan-out, and the last normalization scale of each residual branch at zero.
    Padding follows PyTorch, so that PyTorch's checkpoints compute the same here.

    Submodules: ``stem_conv``, ``stem_norm``, ``stage{s}_block{b}`` with ``conv{i}``, ``norm{i}``,
    ``shortcut_conv`` and ``shortcut_norm``, and ``head``.

    Attributes:
        stage_sizes: Number of blocks in each stage.
        features: Number of channels that the first stage's blocks return.
        block: Class of the blocks: ``BasicBlock``, ``Bottleneck``, their pre-activation siblings,
            a partial of one, or any of these under ``nn.remat``.
        num_classes: Number of classes; None returns the features of every stage, without a head.
        stem_features: Number of channels of the stem.
        dilations: Dilation of each stage's 3x3 convolutions; all 1 if None. A stage with a larger
            dilation than the previous stage keeps the resolution. Its first 3x3 convolution has the
            previous dilation, as in torchvision. For example, (1, 1, 2, 4) has output stride 8.
        frozen_stages: Number of frozen parts: 0 for none, 1 for the stem, 2 for the stem and the
            first stage, and so on. Their normalizations use running statistics and do not update
            them, and their parameters have zero gradients.
        conv: Maker of a convolution: ``nn.Conv``, ``WSConv`` or a partial of them.
        norm: Maker of a normalization: ``nn.BatchNorm``, ``nn.GroupNorm``, ``BatchChannelNorm`` or
            a partial of them. If it takes ``use_running_average``, the network sets it.
        dtype: Computation dtype; parameters and the head's logits are float32 or wider.

    Raises:
        TypeError: If the images are not floating-point.
        ValueError: For a stage without blocks, dilations or frozen stages that do not fit the
            stages, features that the block cannot have, or images that are not [B, H, W, C].

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385;
        Xie et al., Aggregated Residual Transformations for Deep Neural Networks,
        https://arxiv.org/abs/1611.05431; Goyal et al., Accurate, Large Minibatch SGD,
        https://arxiv.org/abs/1706.02677, for the zero scales and the place of the stride

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
    num_classes: int | None = 1000
    stem_features: int = 64
    dilations: Sequence[int] | None = None
    frozen_stages: int = 0
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        sizes, dilations = self.stage_sizes, self.dilations
        check_stage_sizes(sizes)
        if dilations is not None and (len(dilations) != len(sizes) or min(dilations) < 1):
            raise ValueError(
                f"dilations must be one positive number for each of {len(sizes)} stages, received "
                f"{dilations}."
            )
        if not 0 <= self.frozen_stages <= len(sizes) + 1:
            raise ValueError(
                f"frozen_stages must be from 0 to {len(sizes) + 1}, the stem and all stages, "
                f"received {self.frozen_stages}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, image_hw: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, ...]:
        """Computes logits [B, num_classes] of floating-point images [B, H, W, C].

        If ``num_classes`` is None, it returns a tuple of every stage's features instead, starting
        with [B, H / 4, W / 4, features].

        Args:
            images: Normalized images.
            train: Whether normalizations use and update training statistics; then apply with
                ``mutable=["batch_stats"]``.
            image_hw: Heights and widths [B, 2], in pixels, of images that are padded below and on
                the right to a multiple of the strides. The padding then counts in no statistic and
                its features are zero; all other features equal those of the image without padding.
                Needs a normalization that takes a ``mask``.
        """
        check_images(images)
        conv = maker("conv", self.conv, dtype=self.dtype)
        padding = Padding.of(images, image_hw)

        def norm_of(stage: int) -> ModuleFactory:
            norm = padding.leave_out_of(maker("norm", self.norm, dtype=self.dtype))
            return bind_mode(norm, train=train and stage >= self.frozen_stages)

        preactivation = block_class(self.block).preactivation
        x = padding.fill(images)
        x = make_conv(conv, self.stem_features, 7, strides=2, name="stem_conv")(x)
        if not preactivation:
            x = nn.relu(norm_of(0)(name="stem_norm")(x))
        x = padding.fill(max_pool(padding.fill(x, -jnp.inf)))
        x = lax.stop_gradient(x) if self.frozen_stages else x

        outputs = []
        dilations = self.dilations or (1,) * len(self.stage_sizes)
        for stage, size in enumerate(self.stage_sizes, start=1):
            before, dilation = (dilations[0], *dilations)[stage - 1 : stage + 1]
            for index in range(size):
                x = self.block(
                    self.features * 2 ** (stage - 1),
                    conv=conv,
                    norm=norm_of(stage),
                    strides=2 if stage > 1 and index == 0 and dilation <= before else 1,
                    dilation=dilation,
                    first_dilation=before if index == 0 else None,
                    name=f"stage{stage}_block{index + 1}",
                )(x)
            x = lax.stop_gradient(x) if stage < self.frozen_stages else x
            outputs.append(padding.fill(x))
        if preactivation:
            x = nn.relu(norm_of(len(outputs))(name="last_norm")(x))
        if self.num_classes is None:
            return (*outputs[:-1], x)
        return classify(x, self.num_classes, mask=padding.mask(x))


def check_stage_sizes(sizes: Sequence[int]) -> None:
    """Raises ValueError unless there is a stage and every stage has a block."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"Each stage must have at least one block, received stage_sizes={sizes}.")


def max_pool(x: jax.Array) -> jax.Array:
    """Applies the stem's max pooling, 3x3 with strides 2."""
    padding: Any = ((1, 1), (1, 1))  # Pads with minus infinity; Flax types padding as str alone.
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
