"""Matching of anchors or proposals to ground-truth boxes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops.detection._boxes import box_iou
from wsbcn_flax.ops.detection._checks import as_boxes, as_valid
from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention

_BLOCK = 16384  # References whose IoU with all ground truth is in memory at once.


class Matches(NamedTuple):
    """The ground truth of each reference box.

    Attributes:
        index: Ground-truth box of largest IoU, the first of equals, [A], int32.
        positive: Flags [A] of references that are matched to this box.
        negative: Flags [A] of references that are background. References with neither flag are
            ignored.
    """

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # the field's own name
    positive: jax.Array
    negative: jax.Array


def match_boxes(
    references: jax.Array,
    boxes: jax.Array,
    *,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool = False,
    valid: jax.Array | None = None,
    reference_valid: jax.Array | None = None,
    convention: BoxConvention = TORCHVISION,
) -> Matches:
    """Matches anchors or proposals to ground-truth boxes by IoU.

    A reference is positive if its largest IoU reaches ``positive_iou``, and negative if this IoU is
    below ``negative_iou``. With ``low_quality`` the best references of every ground-truth box that
    some reference overlaps are positive too, all of them if several tie. As in the published
    detectors, they are matched to their own best box, which may be another one. There is no
    gradient.

    Without any valid ground truth every valid reference is negative. Authors who ignore anchors at
    the border match them first. To do the same, combine both flags with ``trained_anchors``
    afterwards.

    Args:
        references: Anchors or proposals [A, 4], xyxy in pixels.
        boxes: Ground truth [G, 4], padded to a fixed size; G is at least 1.
        positive_iou: Smallest IoU of a positive.
        negative_iou: Smallest IoU that is not negative; at most ``positive_iou``.
        low_quality: Whether every ground-truth box gets its best references.
        valid: Flags [G] of ground truth that is not padding, or None for all.
        reference_valid: Flags [A] of valid references, or None for all. Other references have
            neither flag and are never a box's best.
        convention: Convention of widths.

    Returns:
        Indices and flags, [A] each.

    Raises:
        ValueError: If a shape or the order of the thresholds is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import match_boxes
        >>> boxes = jnp.array([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 0.0, 0.0]])
        >>> anchors = boxes[:1] + jnp.array([[0.0], [3.0], [9.0]])
        >>> valid = jnp.array([True, False])
        >>> matches = match_boxes(anchors, boxes, positive_iou=0.7, negative_iou=0.3, valid=valid)
        >>> matches.positive.tolist(), matches.negative.tolist()
        ([True, False, False], [False, False, True])
    """
    references = lax.stop_gradient(as_boxes(references, "references", rank=2))
    boxes = lax.stop_gradient(as_boxes(boxes, "boxes", rank=2))
    valid = as_valid(valid, boxes.shape[:1], "valid")
    reference_valid = as_valid(reference_valid, references.shape[:1], "reference_valid")
    if not len(boxes):
        raise ValueError("boxes must have at least one slot, received none. Pad with invalid ones.")
    if not 0 < negative_iou <= positive_iou:
        raise ValueError(
            "thresholds must satisfy 0 < negative_iou <= positive_iou, received "
            f"{negative_iou} and {positive_iou}."
        )

    count = len(references)
    size = max(min(_BLOCK, count), 1)

    def in_blocks(x):
        x = jnp.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    def overlaps(references, reference_valid):
        iou = box_iou(boxes, references, convention=convention)
        iou = jnp.where(valid[:, None] & reference_valid[None], iou, -1)
        # A second pass finds ties by equality. Without the barrier, XLA might fuse the formula
        # differently there, with other rounding.
        return lax.optimization_barrier(iou)

    def best(block):
        iou = overlaps(*block)
        return jnp.argmax(iou, 0), jnp.max(iou, 0), jnp.max(iou, 1)

    blocks = in_blocks(references), in_blocks(reference_valid)
    index, reference_best, best_in_block = lax.map(best, blocks)
    positive = reference_best >= positive_iou
    if low_quality:
        box_best = jnp.max(best_in_block, 0)
        box_best = jnp.where(box_best > 0, box_best, jnp.inf)[:, None]
        positive |= lax.map(lambda block: jnp.any(overlaps(*block) == box_best, 0), blocks)
    index, reference_best, positive = (
        x.reshape(-1)[:count] for x in (index, reference_best, positive)
    )
    negative = (reference_best < negative_iou) & ~positive & reference_valid
    return Matches(index.astype(jnp.int32), positive, negative)
