"""Boxes as offsets from reference boxes."""

import math

import jax
import jax.numpy as jnp

from wsbcn_flax.ops.detection._checks import as_boxes
from wsbcn_flax.ops.detection._conventions import TORCHVISION, BoxConvention

Weights = tuple[float, float, float, float]

_LARGEST_GROWTH = math.log(1000 / 16)  # Of a side, from a reference to a decoded box.
_SMALLEST_SIDE = 1e-3  # In pixels; keeps degenerate boxes and their gradients finite.


def encode_boxes(
    boxes: jax.Array,
    references: jax.Array,
    *,
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Expresses boxes as offsets from references, as R-CNN's regression targets.

        dx = wx (cx - cx_ref) / w_ref        dw = ww log(w / w_ref)

    with centers (cx, cy), widths w and heights h; dy and dh are the same along y. Sides count as at
    least 0.001 pixels, so degenerate boxes give finite offsets and gradients.

    Args:
        boxes: Boxes [..., 4], xyxy in pixels.
        references: Anchors or proposals, of the same shape.
        weights: Factors (wx, wy, ww, wh) of the offsets.
        convention: Convention of widths.

    Returns:
        Offsets (dx, dy, dw, dh), [..., 4], float32.

    Raises:
        ValueError: If the shapes differ, or the last axis is not 4.

    References:
        Girshick et al., Rich feature hierarchies for accurate object detection and semantic
        segmentation, https://arxiv.org/abs/1311.2524

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import decode_boxes, encode_boxes
        >>> references = jnp.array([[0.0, 0.0, 10.0, 20.0]])
        >>> deltas = encode_boxes(jnp.array([[5.0, 0.0, 15.0, 20.0]]), references)
        >>> deltas.tolist()
        [[0.5, 0.0, 0.0, 0.0]]
        >>> decode_boxes(deltas, references).tolist()
        [[5.0, 0.0, 15.0, 20.0]]
    """
    boxes, references = _pair(boxes, references, "boxes")
    x, y, w, h = _center_and_sides(boxes, convention)
    x_ref, y_ref, w_ref, h_ref = _center_and_sides(references, convention)
    offsets = [
        (x - x_ref) / w_ref,
        (y - y_ref) / h_ref,
        jnp.log(w / w_ref),
        jnp.log(h / h_ref),
    ]
    return jnp.stack([weight * d for weight, d in zip(weights, offsets, strict=True)], -1)


def decode_boxes(
    deltas: jax.Array,
    references: jax.Array,
    *,
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
    convention: BoxConvention = TORCHVISION,
) -> jax.Array:
    """Moves and scales references by offsets; the inverse of ``encode_boxes``.

    No side grows by more than 1000 / 16 times: dw and dh are cut off at the logarithm of this.

    Args:
        deltas: Offsets (dx, dy, dw, dh), [..., 4].
        references: Anchors or proposals, of the same shape, xyxy in pixels.
        weights: Factors (wx, wy, ww, wh) that the offsets were multiplied by.
        convention: Convention of widths.

    Returns:
        Boxes [..., 4], xyxy in pixels, float32.

    Raises:
        ValueError: If the shapes differ, or the last axis is not 4.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import decode_boxes
        >>> decode_boxes(jnp.array([0.0, 0.5, 0.0, 0.0]), jnp.array([0.0, 0.0, 4.0, 4.0])).tolist()
        [0.0, 2.0, 4.0, 6.0]
    """
    deltas, references = _pair(deltas, references, "deltas")
    dx, dy, dw, dh = (deltas[..., i] / weight for i, weight in enumerate(weights))
    x, y, w, h = _center_and_sides(references, convention)
    x, y = x + dx * w, y + dy * h
    w, h = (side * jnp.exp(jnp.minimum(d, _LARGEST_GROWTH)) for side, d in ((w, dw), (h, dh)))
    last = convention.pixel
    return jnp.stack([x - w / 2, y - h / 2, x + w / 2 - last, y + h / 2 - last], -1)


def _pair(values, references, name) -> tuple[jax.Array, jax.Array]:
    values, references = as_boxes(values, name), as_boxes(references, "references")
    if values.shape != references.shape:
        raise ValueError(
            f"{name} and references must have the same shape, received {values.shape} and "
            f"{references.shape}. Broadcast references with jnp.broadcast_to."
        )
    return values, references


def _center_and_sides(boxes, convention):
    corner, sides = boxes[..., :2], boxes[..., 2:] - boxes[..., :2] + convention.pixel
    sides = jnp.maximum(sides, _SMALLEST_SIDE)
    return *jnp.moveaxis(corner + sides / 2, -1, 0), *jnp.moveaxis(sides, -1, 0)
