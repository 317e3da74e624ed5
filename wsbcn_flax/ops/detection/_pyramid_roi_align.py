"""RoIAlign over the levels of a pyramid."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops.detection._boxes import box_area
from wsbcn_flax.ops.detection._checks import as_boxes, as_valid
from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention
from wsbcn_flax.ops.detection._roi_align import Implementation, dispatch
from wsbcn_flax.ops.detection._roi_einsum import einsum_roi_align
from wsbcn_flax.ops.detection._roi_gather import gather_roi_align
from wsbcn_flax.ops.detection._roi_samples import Grid, Rois


def pyramid_roi_align(
    pyramid: Sequence[jax.Array],
    boxes: jax.Array,
    *,
    strides: Sequence[int] = (4, 8, 16, 32),
    output_size: int | tuple[int, int],
    samples: int = 2,
    aligned: bool = False,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Pools each box with ``roi_align`` from the level of a pyramid that suits its size.

    Boxes of 224 x 224 pixels use the map of stride 16, as ``roi_levels`` says.

    Args:
        pyramid: Features [B, H, W, C] of every level, from the finest on.
        boxes: Boxes [B, N, 4], xyxy in pixels of the image.
        strides: Stride of every level; each is twice the one before.
        output_size: Number of bins along y and x, or one number for both.
        samples: Number of samples along each side of a bin.
        aligned: Position of pixel centers, as in ``roi_align``.
        valid: Flags [B, N] of valid boxes, or None for all. Other boxes give zeros.
        implementation: Name of the implementation, as in ``roi_align``.
        convention: Convention of areas, which choose the levels.

    Returns:
        Pooled features [B, N, bins, bins, C], in the dtype of the features.

    Raises:
        ValueError: If a shape or an option is wrong.

    References:
        Lin et al., Feature Pyramid Networks for Object Detection,
        https://arxiv.org/abs/1612.03144

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import pyramid_roi_align
        >>> pyramid = [jnp.full((1, 256 // s, 256 // s, 1), 1.0 * s) for s in (4, 8, 16)]
        >>> boxes = jnp.array([[[0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 150.0, 150.0]]])
        >>> pooled = pyramid_roi_align(pyramid, boxes, strides=(4, 8, 16), output_size=1)
        >>> pooled.ravel().tolist()
        [4.0, 8.0]
    """
    boxes = lax.stop_gradient(as_boxes(boxes, "boxes", rank=3))
    images, count = boxes.shape[:2]
    if len(pyramid) != len(strides) or any(f.shape[:-3] != (images,) for f in pyramid):
        raise ValueError(
            "pyramid must have one map [B, H, W, C] for each stride, received shapes "
            f"{[f.shape for f in pyramid]} for strides {tuple(strides)} and boxes {boxes.shape}."
        )
    valid = as_valid(valid, boxes.shape[:2], "valid")
    boxes = jnp.where(valid[..., None], boxes, 0)
    image = jnp.broadcast_to(jnp.arange(images)[:, None], (images, count))
    rois = Rois(boxes, image, roi_levels(boxes, strides=strides, convention=convention), valid)
    options = {
        "scales": tuple(1 / stride for stride in strides),
        "grid": Grid.checked(output_size, samples, aligned),
    }

    def gather(pyramid, rois):
        rois = Rois(*(x.reshape(-1, *x.shape[2:]) for x in rois))
        pooled = gather_roi_align(pyramid, rois, **options)
        return pooled.reshape(images, count, *pooled.shape[1:])

    @jax.vmap
    def einsum(pyramid, rois):
        pyramid = [features[None] for features in pyramid]
        return einsum_roi_align(pyramid, rois._replace(image=0 * rois.image), **options)

    return dispatch(implementation, gather, einsum, tuple(pyramid), rois)


def roi_levels(
    boxes: jax.Array,
    *,
    strides: Sequence[int] = (4, 8, 16, 32),
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Chooses the level of a pyramid for each box by its area.

        level = floor(4 + log2(sqrt(area) / 224 + 1e-6))

    where level l has stride 2^l. The result is clipped to the levels that exist.

    Args:
        boxes: Boxes [..., 4], xyxy in pixels of the image.
        strides: Stride of every level, powers of two; each is twice the one before.
        convention: Convention of areas.

    Returns:
        Positions in ``strides`` [...], int32.

    Raises:
        ValueError: If the strides are not consecutive powers of two.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import roi_levels
        >>> sides = jnp.array([10.0, 100.0, 200.0, 300.0, 2000.0])
        >>> roi_levels(jnp.stack([0 * sides, 0 * sides, sides, sides], -1)).tolist()
        [0, 0, 1, 2, 3]
    """
    first = strides[0].bit_length() - 1
    if list(strides) != [2 ** (first + i) for i in range(len(strides))]:
        raise ValueError(f"strides must be consecutive powers of two, received {tuple(strides)}.")
    side = jnp.sqrt(box_area(boxes, convention=convention))
    level = jnp.floor(4 + jnp.log2(side / 224 + 1e-6))
    return jnp.clip(level - first, 0, len(strides) - 1).astype(jnp.int32)
