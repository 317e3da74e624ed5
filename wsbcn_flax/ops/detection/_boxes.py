"""Areas, overlaps and clipping of boxes."""

import jax
import jax.numpy as jnp

from wsbcn_flax.ops.detection._checks import as_boxes
from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention


def box_area(boxes: jax.Array, *, convention: BoxConvention = TORCHVISION) -> jax.Array:
    """Computes width x height in square pixels; 0 for boxes whose corners are out of order.

    Args:
        boxes: Boxes [..., 4], xyxy in pixels.
        convention: Convention of widths.

    Returns:
        Areas [...], float32.

    Raises:
        ValueError: If the last axis is not 4.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import AUTHORS, box_area
        >>> box = jnp.array([0.0, 0.0, 3.0, 1.0])
        >>> float(box_area(box)), float(box_area(box, convention=AUTHORS))
        (3.0, 8.0)
    """
    return _area(*jnp.moveaxis(as_boxes(boxes, "boxes"), -1, 0), pixel=convention.pixel)


def box_iou(a: jax.Array, b: jax.Array, *, convention: BoxConvention = TORCHVISION) -> jax.Array:
    """Computes the intersection over union of every pair of boxes.

    Pairs without any area have IoU 0. Gradients are finite everywhere.

    Args:
        a: Boxes [N, 4], xyxy in pixels.
        b: Boxes [M, 4], xyxy in pixels.
        convention: Convention of widths.

    Returns:
        IoU [N, M] from 0 to 1, float32.

    Raises:
        ValueError: If an array does not have shape [N, 4].

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import box_iou
        >>> a = jnp.array([[0.0, 0.0, 2.0, 2.0]])
        >>> b = jnp.array([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
        >>> [round(float(iou), 4) for iou in box_iou(a, b)[0]]
        [0.3333, 1.0, 0.0]
    """
    a, b = as_boxes(a, "a", rank=2), as_boxes(b, "b", rank=2)
    return pairwise_iou(a.T, b.T, convention=convention)


def pairwise_iou(a: jax.Array, b: jax.Array, *, convention: BoxConvention) -> jax.Array:
    """Computes IoU [..., N, M] of boxes [4, ..., N] and [4, ..., M], laid out for vector units."""
    a, b, pixel = a[..., :, None], b[..., None, :], convention.pixel
    low = (jnp.maximum(a[i], b[i]) for i in (0, 1))
    high = (jnp.minimum(a[i], b[i]) for i in (2, 3))
    overlap = _area(*low, *high, pixel=pixel)
    union = _area(*a, pixel=pixel) + _area(*b, pixel=pixel) - overlap
    return overlap / jnp.where(union > 0, union, 1)


def _area(x1, y1, x2, y2, *, pixel):
    return jnp.maximum(x2 - x1 + pixel, 0) * jnp.maximum(y2 - y1 + pixel, 0)


def clip_boxes(
    boxes: jax.Array,
    image_hw: jax.typing.ArrayLike,
    *,
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Moves corners that lie outside the image onto its border.

    Args:
        boxes: Boxes [..., 4], xyxy in pixels.
        image_hw: Height and width of the image in pixels, [2].
        convention: Convention of the largest coordinate.

    Returns:
        Boxes of the same shape, float32.

    Raises:
        ValueError: If the last axis is not 4, or ``image_hw`` is not a pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import AUTHORS, clip_boxes
        >>> box = jnp.array([-3.0, 2.0, 50.0, 9.0])
        >>> clip_boxes(box, (10, 20)).tolist()
        [0.0, 2.0, 20.0, 9.0]
        >>> clip_boxes(box, (10, 20), convention=AUTHORS).tolist()
        [0.0, 2.0, 19.0, 9.0]
    """
    boxes = as_boxes(boxes, "boxes")
    xyxy_limit = _limits(image_hw, boxes.dtype) - convention.pixel
    return jnp.clip(boxes, 0, jnp.broadcast_to(xyxy_limit, boxes.shape))


def trained_anchors(
    anchors: jax.Array, image_hw: jax.typing.ArrayLike, *, convention: BoxConvention = TORCHVISION
) -> jax.Array:
    """Flags the anchors that a convention trains: all, or those inside the image.

    Args:
        anchors: Anchors [..., 4], xyxy in pixels.
        image_hw: Height and width of the image in pixels, [2].
        convention: Convention of anchors that cross the border.

    Returns:
        Flags [...].

    Raises:
        ValueError: If the last axis is not 4, or ``image_hw`` is not a pair.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import AUTHORS, trained_anchors
        >>> anchors = jnp.array([[0.0, 0.0, 9.0, 9.0], [-1.0, 0.0, 9.0, 9.0]])
        >>> trained_anchors(anchors, (10, 10), convention=AUTHORS).tolist()
        [True, False]
    """
    anchors = as_boxes(anchors, "anchors")
    limit = jnp.broadcast_to(_limits(image_hw, anchors.dtype), anchors.shape)
    if convention.border_anchors:
        return jnp.ones(anchors.shape[:-1], bool)
    low, high = anchors[..., :2] >= 0, anchors[..., 2:] < limit[..., 2:]
    return (low & high).all(-1)


def _limits(image_hw, dtype) -> jax.Array:
    """Returns width, height, width, height."""
    image_hw = jnp.asarray(image_hw, dtype)
    if image_hw.shape != (2,):
        raise ValueError(
            f"image_hw must be a height and a width, received shape {image_hw.shape}. Map over "
            "images with jax.vmap."
        )
    return jnp.tile(image_hw[::-1], 2)
