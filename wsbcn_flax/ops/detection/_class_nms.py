"""Non-maximum suppression within every class."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops.detection._checks import as_boxes, as_valid
from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention
from wsbcn_flax.ops.detection._nms import nms


def class_nms(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    iou_threshold: float,
    valid: jax.Array | None = None,
    classes_at_a_time: int = 10,
    block: int = 256,
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Flags the boxes that ``nms`` keeps within every class.

    Args:
        boxes: Boxes [N, K, 4], one for each class, xyxy in pixels.
        scores: Scores [N, K].
        iou_threshold: Largest IoU of two boxes of a class that are both kept.
        valid: Flags [N, K] of valid boxes, or None for all.
        classes_at_a_time: Number of classes that share a pass; more classes need more memory.
        block: Number of boxes along a tile's side.
        convention: Convention of widths.

    Returns:
        Flags [N, K].

    Raises:
        ValueError: As ``nms`` does.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import class_nms
        >>> boxes = jnp.tile(jnp.array([0.0, 0.0, 9.0, 9.0]), (2, 3, 1))
        >>> scores = jnp.array([[0.9, 0.2, 0.8], [0.3, 0.6, 0.7]])
        >>> class_nms(boxes, scores, iou_threshold=0.5).tolist()
        [[True, False, True], [False, True, False]]
    """
    boxes, scores = as_boxes(boxes, "boxes", rank=3), jnp.asarray(scores)
    valid = as_valid(valid, boxes.shape[:-1], "valid")
    count, classes = valid.shape
    suppress = functools.partial(
        nms, iou_threshold=iou_threshold, block=block, convention=convention
    )

    def grouped(x):
        """Puts classes first, pads and splits them: [groups, classes_at_a_time, N, ...]."""
        x = jnp.swapaxes(x, 0, 1)
        x = jnp.pad(x, [(0, -classes % classes_at_a_time)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, classes_at_a_time, *x.shape[1:])

    keep = lax.map(
        lambda group: suppress(group[0], group[1], valid=group[2]),
        (grouped(boxes), grouped(scores), grouped(valid)),
    )
    return keep.reshape(-1, count)[:classes].T
