"""RoIAlign's sampling points along an axis, and their bilinear weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rois(NamedTuple):
    """Regions of interest, and the maps that they are pooled from.

    Attributes:
        boxes: Boxes [R, 4], xyxy in pixels of the image.
        image: Image of each RoI, [R].
        level: Pyramid level of each RoI, [R].
        valid: Flags [R] of valid RoIs; others give zeros.
    """

    boxes: jax.Array
    image: jax.Array
    level: jax.Array
    valid: jax.Array


class Grid(NamedTuple):
    """A grid of bins: their number along y and x, samples along a bin's side, pixel centers."""

    rows: int
    columns: int
    samples: int
    aligned: bool

    @classmethod
    def checked(cls, output_size: int | tuple[int, int], samples: int, aligned: bool) -> "Grid":
        """Returns the grid of these options.

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
        """Returns y [R, rows, samples] and x of the points in boxes [R, 4], all in map pixels."""
        x1, y1, x2, y2 = boxes.T
        return (
            sample_points(y1, y2, bins=self.rows, samples=self.samples, aligned=self.aligned),
            sample_points(x1, x2, bins=self.columns, samples=self.samples, aligned=self.aligned),
        )


def sample_points(
    start: jax.Array, end: jax.Array, *, bins: int, samples: int, aligned: bool
) -> jax.Array:
    """Returns points [R, bins, samples] of intervals [R], all in pixels of a feature map.

    ``aligned`` puts the center of pixel 0 at 0.5. Otherwise the center is at 0 and an interval is
    at least 1 long.
    """
    if aligned:
        start, end = start - 0.5, end - 0.5
    length = end - start if aligned else jnp.maximum(end - start, 1)
    step = (length / bins)[:, None, None]
    bin_index = jnp.arange(bins, dtype=start.dtype)[None, :, None]
    offset = (jnp.arange(samples, dtype=start.dtype) + 0.5)[None, None] / samples
    return start[:, None, None] + bin_index * step + offset * step


def corners(points: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both neighbours [2, R, ...] of points [R, ...] on axes of size [R], and weights.

    Points up to one pixel outside the axis are clamped to it; those further away have weight 0.
    """
    size = size.reshape(-1, *[1] * (points.ndim - 1))
    inside = (points >= -1) & (points <= size)
    points = jnp.clip(points, 0, size - 1)
    low = jnp.minimum(jnp.floor(points), size - 1)
    high = jnp.minimum(low + 1, size - 1)
    weights = jnp.stack([1 - (points - low), points - low]) * inside[None]
    return jnp.stack([low, high]).astype(jnp.int32), weights


def axis_weights(points: jax.Array, size: int) -> jax.Array:
    """Returns weights [..., size] of an axis' pixels in bilinear samples at points [...].

    Points up to one pixel outside the axis are clamped to it; those further away have weight 0.
    """
    inside = (points >= -1) & (points <= size)
    return tent(jnp.clip(points, 0, size - 1), size) * inside[..., None]


def tent(points: jax.Array, size: int) -> jax.Array:
    """Returns max(0, 1 - |point - i|) [..., size] for pixels i; it fades to 0 beyond the axis."""
    pixels = jnp.arange(size, dtype=points.dtype).reshape(*[1] * points.ndim, size)
    return jnp.maximum(1 - jnp.abs(points[..., None] - pixels), 0)
