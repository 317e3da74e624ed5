"""Exact greedy non-maximum suppression, in tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wsbcn_flax.ops.detection._boxes import pairwise_iou
from wsbcn_flax.ops.detection._checks import as_boxes, as_valid
from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention


def nms(
    boxes: jax.Array,
    scores: jax.Array,
    *,
    iou_threshold: float,
    valid: jax.Array | None = None,
    block: int = 256,
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Flags the boxes that greedy non-maximum suppression keeps.

    From the highest score to the lowest, a box is kept unless its IoU with a kept box exceeds the
    threshold. Of equal scores the earlier box comes first, and NaN counts as the lowest. The result
    is exact for every ``block``, the side of a tile of the IoU matrix. There is no gradient.

    Leading axes are independent problems. Blocks that are invalid in all of them cost nothing.
    ``jax.vmap`` gives the same result more slowly.

    Args:
        boxes: Boxes [..., N, 4], xyxy in pixels.
        scores: Scores [..., N].
        iou_threshold: Largest IoU of two boxes that are both kept.
        valid: Flags [..., N] of valid boxes; None for all. Other boxes are not kept and suppress
            none.
        block: Number of boxes along a tile's side; N or more computes the whole matrix at once.
        convention: Convention of widths.

    Returns:
        Flags [..., N], in the order of ``boxes``.

    Raises:
        ValueError: If shapes disagree, the threshold is not from 0 to 1, or the block is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import nms
        >>> boxes = jnp.array([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 0.0, 29.0, 9.0]])
        >>> nms(boxes, jnp.array([0.8, 0.9, 0.1]), iou_threshold=0.5).tolist()
        [False, True, True]
    """
    boxes, scores = as_boxes(boxes, "boxes"), jnp.asarray(scores)
    valid = as_valid(valid, boxes.shape[:-1], "valid")
    if scores.shape != boxes.shape[:-1]:
        raise ValueError(
            f"scores must hold one score for each box, received {scores.shape} for boxes "
            f"{boxes.shape}."
        )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be from 0 to 1, received {iou_threshold}.")
    if block < 1:
        raise ValueError(f"block must be at least 1, received {block}.")
    *lead, count = scores.shape
    if scores.size == 0:
        return valid
    boxes, scores = lax.stop_gradient((boxes.reshape(-1, count, 4), scores.reshape(-1, count)))
    valid = valid.reshape(-1, count)
    keep = _nms(boxes, scores, valid, iou_threshold, min(block, count), convention)
    return keep.reshape(*lead, count)


def _nms(boxes, scores, valid, iou_threshold, block, convention):
    """Suppresses boxes [K, N, 4], one block of the boxes sorted by score after another."""
    count = scores.shape[-1]
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), axis=-1, stable=True)
    padding = [(0, 0), (0, -count % block)]
    ordered = jnp.take_along_axis(boxes, order[..., None], 1)
    ordered = jnp.pad(jnp.moveaxis(ordered, -1, 0), [(0, 0), *padding])  # [4, K, blocks * block]
    alive = jnp.pad(jnp.take_along_axis(valid, order, 1), padding)
    overlaps = functools.partial(
        _overlaps, threshold=_exact_threshold(iou_threshold, boxes.dtype), convention=convention
    )

    def cut(array, i):
        return lax.dynamic_slice_in_dim(array, i * block, block, -1)

    def settle(i, keep):
        here = cut(ordered, i)

        def suppress(j, alive):
            return alive & ~_any_hit(overlaps(cut(ordered, j), here), cut(keep, j))

        alive = lax.fori_loop(0, i, suppress, cut(keep, i))
        alive = _settle_block(overlaps(here, here), alive)
        return lax.dynamic_update_slice_in_dim(keep, alive, i * block, -1)

    last = jnp.max(jnp.any(alive, 0) * (1 + jnp.arange(alive.shape[1])))
    blocks = (last + block - 1) // block  # Up to the last block that holds a valid box.
    keep = lax.fori_loop(0, blocks, settle, alive)
    return jnp.zeros_like(valid).at[jnp.arange(len(order))[:, None], order].set(keep[:, :count])


def _settle_block(overlap, alive):
    """Suppresses greedily within a block: the fixed point of keep = alive & ~(hit by kept)."""
    # Each pass settles at least one more box, the next in order; in practice ten passes suffice.
    overlap = jnp.triu(overlap, 1)  # The earlier box suppresses.

    def unsettled(state):
        keep, before = state
        return jnp.any(keep != before)

    def again(state):
        keep, _ = state
        return alive & ~_any_hit(overlap, keep), keep

    return lax.while_loop(unsettled, again, again((alive, alive)))[0]


def _any_hit(overlap, keep):
    """Returns whether a kept box [K, N] overlaps each of M boxes, from flags [K, N, M]."""
    # XLA for CPU reduces over N 8 times as fast as it would over a last axis (jaxlib 0.10.2).
    return jnp.any(overlap & keep[:, :, None], 1)


def _overlaps(a, b, *, threshold, convention):
    return pairwise_iou(a, b, convention=convention) > threshold


def _exact_threshold(threshold: float, dtype) -> np.ndarray:
    """Returns the largest number of the dtype up to the threshold; none lies between the two."""
    rounded = np.asarray(threshold, dtype)
    return rounded if float(rounded) <= threshold else np.nextafter(rounded, np.asarray(0, dtype))
