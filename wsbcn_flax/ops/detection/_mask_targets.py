"""Ground-truth masks on the grids of sampled RoIs."""

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops.detection._checks import as_boxes, as_valid
from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention
from wsbcn_flax.ops.detection._roi_samples import axis_weights, tent


def mask_targets(
    masks: jax.Array,
    boxes: jax.Array,
    rois: jax.Array,
    index: jax.Array,
    *,
    size: int = 28,
    valid: jax.Array | None = None,
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Resamples masks in the frames of their boxes onto the grids of RoIs.

    A mask of M x M covers only its own box, so that it needs little memory. The host rasterizes
    polygons in this way. The target is 1 where the bilinear sample at a bin's center is at least
    0.5. It is 0 outside the box. There is no gradient.

    Args:
        masks: Masks [G, M, M], from 0 to 1, for example uint8.
        boxes: Frames of the masks [G, 4], xyxy in pixels.
        rois: RoIs [R, 4], xyxy in pixels; they count as at least one pixel wide and high.
        index: Mask of each RoI, [R].
        size: Number of bins along each side of a RoI.
        valid: Flags [R] of valid RoIs, or None for all. Other RoIs give zeros.
        convention: Convention of the boxes' widths.

    Returns:
        Zeros and ones [R, size, size], float32.

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import mask_targets
        >>> box = jnp.array([[0.0, 0.0, 8.0, 8.0]])
        >>> roi = jnp.array([[4.0, 4.0, 12.0, 12.0]])
        >>> full = jnp.ones((1, 16, 16), jnp.uint8)
        >>> mask_targets(full, box, roi, jnp.array([0]), size=2)[0].tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    boxes, rois = as_boxes(boxes, "boxes", rank=2), as_boxes(rois, "rois", rank=2)
    valid, masks = as_valid(valid, rois.shape[:1], "valid"), jnp.asarray(masks)
    side = masks.shape[-1]
    if masks.shape != (len(boxes), side, side):
        raise ValueError(
            f"masks must have shape [G, M, M], one for each of the {len(boxes)} boxes, received "
            f"{masks.shape}."
        )
    rois, frames = jnp.where(valid[:, None], rois, 0), boxes[index]

    def weights(axis):
        start, end = rois[:, axis], rois[:, axis + 2]
        center = (jnp.arange(size, dtype=rois.dtype) + 0.5)[None] / size
        center = start[:, None] + center * jnp.maximum(end - start, 1)[:, None]
        origin, last = frames[:, axis], frames[:, axis + 2] + convention.pixel
        pixel = jnp.maximum(last - origin, 1e-3) / side  # A degenerate box has no inside.
        return tent((center - origin[:, None]) / pixel[:, None] - 0.5, side)

    sampled = _resample(masks[index], weights(1), weights(0))
    return lax.stop_gradient((sampled >= 0.5) & valid[:, None, None]).astype(rois.dtype)


def bitmap_targets(
    bitmaps: jax.Array,
    rois: jax.Array,
    index: jax.Array,
    *,
    size: int = 28,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Averages bitmaps of the whole image in the bins of RoIs, as torchvision does for targets.

    This is RoIAlign with ceil(side / size) samples along a side of a bin and no half-pixel shift.
    RoIs must not be larger than the image. There is no gradient.

    Args:
        bitmaps: Bitmaps [G, H, W], from 0 to 1.
        rois: RoIs [R, 4], xyxy in pixels.
        index: Bitmap of each RoI, [R].
        size: Number of bins along each side of a RoI.
        valid: Flags [R] of valid RoIs, or None for all. Other RoIs give zeros.

    Returns:
        Values from 0 to 1, [R, size, size], float32.

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import bitmap_targets
        >>> bitmap = jnp.zeros((1, 16, 16)).at[:, :, :6].set(1)
        >>> roi = jnp.array([[0.0, 0.0, 8.0, 8.0]])
        >>> bitmap_targets(bitmap, roi, jnp.array([0]), size=2)[0].tolist()
        [[1.0, 0.375], [1.0, 0.375]]
    """
    rois = as_boxes(rois, "rois", rank=2)
    valid, bitmaps = as_valid(valid, rois.shape[:1], "valid"), jnp.asarray(bitmaps)
    if bitmaps.ndim != 3:
        raise ValueError(f"bitmaps must have shape [G, H, W], received {bitmaps.shape}.")
    rois = jnp.where(valid[:, None], rois, 0)

    def weights(start, end, pixels):
        """Returns weights [size, pixels] of an axis; the RoI sets the number of samples."""
        side = jnp.maximum(end - start, 1)
        sample = jnp.arange(-(-pixels // size), dtype=rois.dtype)[None]
        # There are ceil(side / size) samples. XLA may divide by a product with 1 / size, of which
        # the ceiling can be one more.
        counted = sample * size < side
        count, step = jnp.sum(counted), side / size
        bins = jnp.arange(size, dtype=rois.dtype)[:, None]
        points = start + bins * step + (sample + 0.5) * step / count
        return jnp.sum(jnp.where(counted[..., None], axis_weights(points, pixels), 0), 1) / count

    def target(roi_index):
        roi, i = roi_index
        height, width = bitmaps.shape[1:]
        rows, columns = weights(roi[1], roi[3], height), weights(roi[0], roi[2], width)
        return _resample(bitmaps[i][None], rows[None], columns[None])[0]

    return lax.stop_gradient(lax.map(target, (rois, index)) * valid[:, None, None])


def _resample(masks, rows, columns):
    """Weights the rows and columns of masks [R, H, W] by [R, P, H] and [R, Q, W]."""
    masks = masks.astype(rows.dtype)
    return jnp.einsum("rph,rhw,rqw->rpq", rows, masks, columns, precision=lax.Precision.HIGHEST)
