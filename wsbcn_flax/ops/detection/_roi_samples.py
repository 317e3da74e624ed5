"""Where RoIAlign looks: sampling points along an axis, and bilinear weights of points."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rois(NamedTuple):
    """Regions of interest, and the maps that they look at.

    Attributes:
        boxes: [R, 4], xyxy in pixels of the image.
        image: Image of each, [R].
        level: Level of the pyramid of each, [R].
        valid: Flags [R]; others give zeros.
    """

    boxes: jax.Array
    image: jax.Array
    level: jax.Array
    valid: jax.Array


class Grid(NamedTuple):
    """Bins along y and x, samples along a side of a bin, and where pixel centers are."""

    rows: int
    columns: int
    samples: int
    aligned: bool

    @classmethod
    def checked(cls, output_size: int | tuple[int, int], samples: int, aligned: bool) -> "Grid":
        """The grid of these options.

        Raises:
            ValueError: If a number is not positive.
        """
        rows, columns = (output_size,) * 2 if isinstance(output_size, int) else output_size
        if min(rows, columns, samples) < 1:
            raise ValueError(
                f"output_size and samples must be at least 1, received {output_size} and {samples}."
            )
        return cls(rows, columns, samples, aligned)

    def points(self, boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sampling points of boxes [R, 4] in pixels of the map: y [R, rows, samples], and x."""
        x1, y1, x2, y2 = boxes.T
        return (
            sample_points(y1, y2, bins=self.rows, samples=self.samples, aligned=self.aligned),
            sample_points(x1, x2, bins=self.columns, samples=self.samples, aligned=self.aligned),
        )


def sample_points(
    start: jax.Array, end: jax.Array, *, bins: int, samples: int, aligned: bool
) -> jax.Array:
    """Points [R, bins, samples] of intervals [R], all in pixels of a feature map.

    ``aligned`` puts the center of pixel 0 at 0.5; otherwise it is at 0 and an interval is at least
    1 long.
    """
    if aligned:
        start, end = start - 0.5, end - 0.5
    length = end - start if aligned else jnp.maximum(end - start, 1)
    step = (length / bins)[:, None, None]
    bin_index = jnp.arange(bins, dtype=start.dtype)[None, :, None]
    offset = (jnp.arange(samples, dtype=start.dtype) + 0.5)[None, None] / samples
    return start[:, None, None] + bin_index * step + offset * step


def corners(points: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both neighbours [2, R, ...] of points [R, ...] on axes of size [R], and their weights.

    Points up to one pixel outside the axis are clamped to it; others have weight 0.
    """
    size = size.reshape(-1, *[1] * (points.ndim - 1))
    inside = (points >= -1) & (points <= size)
    points = jnp.clip(points, 0, size - 1)
    low = jnp.minimum(jnp.floor(points), size - 1)
    high = jnp.minimum(low + 1, size - 1)
    weights = jnp.stack([1 - (points - low), points - low]) * inside[None]
    return jnp.stack([low, high]).astype(jnp.int32), weights


def axis_weights(points: jax.Array, size: int) -> jax.Array:
    """Weights [..., size] of an axis' pixels in bilinear samples at points [...].

    Points up to one pixel outside the axis are clamped to it; others have weight 0.
    """
    inside = (points >= -1) & (points <= size)
    return tent(jnp.clip(points, 0, size - 1), size) * inside[..., None]


def tent(points: jax.Array, size: int) -> jax.Array:
    """Weights max(0, 1 - |point - i|), [..., size], of pixels i; beyond the axis they fade to 0."""
    pixels = jnp.arange(size, dtype=points.dtype).reshape(*[1] * points.ndim, size)
    return jnp.maximum(1 - jnp.abs(points[..., None] - pixels), 0)
