"""VGG networks for small images."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax

from wsbcn_flax.models._layers import (
    ModuleFactory,
    bind_mode,
    check_images,
    classify,
    make_conv,
    maker,
)


class VGG(nn.Module):
    """The VGG network: stages of 3x3 convolutions with norm and ReLU, max pooling after each, head.

    ``VGG16`` and ``VGG19`` are partials of this class. They are the CIFAR variant: five stages of
    64, 128, 256, 512 and 512 channels, each halving the resolution, bring 32x32 images to 1x1. One
    dense layer takes the place of ImageNet's three; features of larger images are averaged before
    it. Convolutions have no bias, since the normalization would remove or repeat it. Initialization
    is he-normal with fan-out.

    Submodules: ``stage{s}_conv{i}``, ``stage{s}_norm{i}`` and ``head``.

    Attributes:
        stage_sizes: Number of convolutions in each stage.
        stage_features: Number of channels of each stage.
        num_classes: Number of classes; None returns the features of every stage, without a head.
        conv: Maker of a convolution: ``nn.Conv``, ``WSConv`` or a partial of them.
        norm: Maker of a normalization: ``nn.BatchNorm``, ``nn.GroupNorm``, ``BatchChannelNorm`` or
            a partial of them. If it takes ``use_running_average``, the network sets it.
        dtype: Computation dtype; the head's logits are float32 or wider.

    Raises:
        TypeError: If the images are not floating-point.
        ValueError: For a stage without convolutions, ``stage_sizes`` and ``stage_features`` of
            unequal length, or images that are not [B, H, W, C] or too small to be halved so often.

    References:
        Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
        https://arxiv.org/abs/1409.1556

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import VGG16
        >>> init = functools.partial(VGG16().init, train=False)
        >>> shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
        >>> shapes["params"]["stage5_conv3"]["kernel"].shape
        (3, 3, 512, 512)
    """

    stage_sizes: Sequence[int]
    stage_features: Sequence[int] = (64, 128, 256, 512, 512)
    num_classes: int | None = 10
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        sizes, features = self.stage_sizes, self.stage_features
        if not sizes or min(sizes) < 1 or len(sizes) != len(features):
            raise ValueError(
                "Each stage must have at least one convolution and its number of channels, "
                f"received stage_sizes={sizes} and stage_features={features}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array | tuple[jax.Array, ...]:
        """Computes logits [B, num_classes] of floating-point images [B, H, W, C].

        If ``num_classes`` is None, it returns a tuple of every stage's features instead.

        Args:
            images: Normalized images, at least 2^stages high and wide.
            train: Whether normalizations use and update training statistics; then apply with
                ``mutable=["batch_stats"]``.
        """
        check_images(images, halvings=len(self.stage_sizes))
        conv = maker("conv", self.conv, dtype=self.dtype)
        norm = bind_mode(maker("norm", self.norm, dtype=self.dtype), train=train)
        x, outputs = images, []
        stages = zip(self.stage_sizes, self.stage_features, strict=True)
        for stage, (size, features) in enumerate(stages, start=1):
            for index in range(1, size + 1):
                x = make_conv(conv, features, 3, name=f"stage{stage}_conv{index}")(x)
                x = nn.relu(norm(name=f"stage{stage}_norm{index}")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            outputs.append(x)
        if self.num_classes is None:
            return tuple(outputs)
        return classify(x, self.num_classes)


VGG16 = functools.partial(VGG, stage_sizes=(2, 2, 3, 3, 3))
VGG19 = functools.partial(VGG, stage_sizes=(2, 2, 4, 4, 4))
