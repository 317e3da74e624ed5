"""Residual networks of depth 6n + 2 for small images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.models._blocks import BasicBlock, ModuleFactory, PreActBlock, bind_mode, conv3x3


class CifarResNet(nn.Module):
    """The CIFAR residual network: a 3x3 stem, three stages of n blocks, average pooling, a head.

    Depth 6n + 2: 8, 14, 20, 32, 44, 56, 110. Stages have width, 2 width and 4 width channels; the
    second and third halve the resolution. Initialization is the authors': he-normal with fan-out,
    and the last normalization scale of each residual branch at zero.

    Attributes:
        depth: 6n + 2.
        num_classes: features of the head.
        width: channels of the first stage.
        stem_strides: of the stem's convolution; 2 for images whose detail is coarse, such as
            MNIST's, at a quarter of the cost.
        block: ``BasicBlock`` or ``PreActBlock``.
        conv: makes a convolution: ``nn.Conv``, ``WSConv`` or a partial of them.
        norm: makes a normalization: ``nn.BatchNorm``, ``nn.GroupNorm``, ``BatchChannelNorm`` or a
            partial of them. It is told the mode where it takes ``use_running_average``.
        dtype: of the computation; the head's logits are float32 or wider.

    Raises:
        TypeError: for images that are not floating-point.
        ValueError: for a depth that is not 6n + 2, or images that are not [B, H, W, C].

    References:
        He et al., Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385

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
    num_classes: int = 10
    width: int = 16
    stem_strides: int = 1
    block: type[BasicBlock] | type[PreActBlock] = BasicBlock
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(
                f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), received {self.depth}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits [B, num_classes] of floating-point images [B, H, W, C].

        Args:
            images: normalized images.
            train: whether normalizations use and update training statistics; then apply with
                ``mutable=["batch_stats"]``.
        """
        _check_images(images)
        conv = functools.partial(self.conv, dtype=self.dtype)
        norm = bind_mode(functools.partial(self.norm, dtype=self.dtype), train=train)
        x = conv3x3(conv, self.width, strides=self.stem_strides, name="stem_conv")(images)
        if self.block.normalizes_output:
            x = nn.relu(norm(name="stem_norm")(x))
        for stage in range(3):
            for index in range((self.depth - 2) // 6):
                x = self.block(
                    self.width * 2**stage,
                    conv=conv,
                    norm=norm,
                    strides=2 if stage > 0 and index == 0 else 1,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x)
        if not self.block.normalizes_output:
            x = nn.relu(norm(name="last_norm")(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.num_classes, name="head")(x)


def _check_images(images: jax.Array) -> None:
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"The model needs floating-point images, received {images.dtype}. Convert and "
            "normalize them first, for example images.astype(jnp.float32) / 255."
        )
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"The model needs non-empty images [B, H, W, C], received shape {images.shape}. "
            "A single image is images[None]; grey images have C = 1."
        )
