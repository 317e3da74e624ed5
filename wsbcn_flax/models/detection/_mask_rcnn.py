"""Faster R-CNN and Mask R-CNN."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.models._layers import ModuleFactory, check_images
from wsbcn_flax.models._padding import Padding
from wsbcn_flax.models.detection._box_head import BoxHead
from wsbcn_flax.models.detection._fpn import FPN
from wsbcn_flax.models.detection._mask_head import MaskHead
from wsbcn_flax.models.detection._rpn_head import RPNHead


class MaskRCNN(nn.Module):
    """The networks of Mask R-CNN with a feature pyramid, or of Faster R-CNN without masks.

    The methods are the parts with parameters: the pyramid and the heads. A task puts the parts
    without parameters between them: anchors, proposals and RoIAlign. Calling the model runs every
    part once, on images and on zeros in place of regions. This makes its variables, and shows which
    convolutions a normalization follows:

        where = normalized_convolutions(model, images, train=False)
        transform = WeightStandardization(preset="official", where=where)

    The authors standardize the same convolutions: those of the backbone and the pyramid, and four
    in each head. ``conv=WSConv`` here and in the backbone gives the same network.

    Submodules: ``backbone``, ``fpn``, ``rpn``, ``box_head`` and ``mask_head``.

    Attributes:
        backbone: Network that returns features of strides 4, 8, 16 and 32, such as
            ``ResNet50(num_classes=None, frozen_stages=2)`` with its own ``conv`` and ``norm``.
        num_classes: Number of object classes, without the background.
        with_mask: Whether there is a mask head.
        features: Number of channels of the pyramid, the proposal network and the convolutions of
            the heads.
        hidden: Number of channels of the box head's first dense layer.
        box_size, mask_size: Side of the region features that the box and mask heads take.
        conv: Maker of the convolutions that a normalization follows, called like ``nn.Conv``.
        norm: Maker of a normalization, as in ``ResNet``.
        dtype: Computation dtype; parameters, logits and deltas are float32 or wider.

    Raises:
        TypeError: If the images are not floating-point.
        ValueError: For images or sizes of another shape, or ``segment`` with ``with_mask=False``.

    References:
        He et al., Mask R-CNN, https://arxiv.org/abs/1703.06870; Qiao et al., Micro-Batch Training
        with Batch-Channel Normalization and Weight Standardization,
        https://arxiv.org/abs/1903.10520, for the normalizations in the pyramid and the heads

    Example:
        >>> import functools, flax.linen as nn, jax, jax.numpy as jnp
        >>> from wsbcn_flax.models import ResNet50
        >>> from wsbcn_flax.models.detection import MaskRCNN
        >>> norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5)
        >>> backbone = ResNet50(num_classes=None, frozen_stages=2, norm=norm)
        >>> model = MaskRCNN(backbone=backbone, num_classes=80, norm=norm)
        >>> init = functools.partial(model.init, train=False)
        >>> shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
        45715509
    """

    backbone: nn.Module
    num_classes: int
    with_mask: bool = True
    features: int = 256
    hidden: int = 1024
    box_size: int = 7
    mask_size: int = 14
    conv: ModuleFactory = nn.Conv
    norm: ModuleFactory = nn.BatchNorm
    dtype: jax.typing.DTypeLike | None = None

    def setup(self):
        options: dict[str, Any] = {"conv": self.conv, "norm": self.norm, "dtype": self.dtype}
        self.fpn = FPN(self.features, **options)
        self.rpn = RPNHead(self.features, dtype=self.dtype)
        self.box_head = BoxHead(
            self.num_classes, features=self.features, hidden=self.hidden, **options
        )
        if self.with_mask:
            self.mask_head = MaskHead(self.num_classes, features=self.features, **options)

    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, Any]:
        """Runs every part once; the heads see zeros, so only the shapes of outputs matter."""
        levels = self.pyramid(images, train=train)

        def regions(size: int) -> jax.Array:
            return jnp.zeros((1, size, size, self.features), levels[0].dtype)

        outputs = {
            "pyramid": levels,
            "proposals": self.propose(levels),
            "boxes": self.classify(regions(self.box_size), train=train),
        }
        if self.with_mask:
            outputs["masks"] = self.segment(regions(self.mask_size), train=train)
        return outputs

    def pyramid(
        self, images: jax.Array, *, train: bool, image_hw: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Computes levels P2 to P6 [B, H / stride, W / stride, features] of images [B, H, W, C].

        Args:
            images: Normalized images, floating-point.
            train: Whether normalizations use and update training statistics.
            image_hw: Heights and widths [B, 2], in pixels, of the images without padding, to leave
                the padding out of statistics; see ``ResNet``.
        """
        check_images(images)
        options = {} if image_hw is None else {"image_hw": image_hw}
        stages = self.backbone(images, train=train, **options)
        return self.fpn(stages, train=train, padding=Padding.of(images, image_hw))

    def propose(self, levels: tuple[jax.Array, ...]) -> list[tuple[jax.Array, jax.Array]]:
        """Computes the objectness logits and the deltas of all anchors; see ``RPNHead``."""
        return self.rpn(levels)

    def classify(self, regions: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Computes the class logits and the deltas of regions; see ``BoxHead``."""
        return self.box_head(regions, train=train)

    def segment(self, regions: jax.Array, *, train: bool) -> jax.Array:
        """Computes the mask logits of regions; see ``MaskHead``."""
        if not self.with_mask:
            raise ValueError("Masks need a mask head, received with_mask=False.")
        return self.mask_head(regions, train=train)
