"""RoIAlign that reads the neighbours of every sample."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wsbcn_flax.ops._checks import statistics_dtype
from wsbcn_flax.ops.detection._roi_samples import Grid, Rois, corners


def gather_roi_align(
    pyramid: Sequence[jax.Array], rois: Rois, *, scales: Sequence[float], grid: Grid
) -> jax.Array:
    """Pools maps [B, H, W, C] in RoIs [R] to features [R, rows, columns, C].

    The positions of all maps are rows of one array, so that one offset points a RoI to its map.
    """
    dtype = pyramid[0].dtype
    flat = jnp.concatenate([f.reshape(-1, f.shape[-1]) for f in pyramid])
    flat = flat.astype(statistics_dtype(dtype))
    first = np.cumsum([0, *(f.size // f.shape[-1] for f in pyramid[:-1])])
    heights, widths = np.transpose([f.shape[1:3] for f in pyramid])
    first, height, width = (jnp.asarray(x)[rois.level] for x in (first, heights, widths))
    scale = jnp.asarray(scales, rois.boxes.dtype)[rois.level]
    y, x = grid.points(rois.boxes * scale[:, None])
    first = first + rois.image * height * width
    (row, row_weight), (column, column_weight) = corners(y, height), corners(x, width)
    row = _per_roi(first) + row * _per_roi(width)
    row_weight = row_weight * _per_roi(rois.valid / grid.samples**2)
    terms = (_terms_first(a) for a in (row, column, row_weight, column_weight))
    return _weighted_rows(flat, *terms).astype(dtype)


def _per_roi(x):
    return x[None, :, None, None]


def _terms_first(x):
    """Reshapes both neighbours of samples, [2, R, bins, samples] to [2 * samples, R, bins]."""
    return jnp.moveaxis(x, -1, 0).reshape(x.shape[0] * x.shape[-1], *x.shape[1:-1])


@jax.custom_vjp
def _weighted_rows(flat, row, column, row_weight, column_weight):
    """Sums rows of flat [S, C] over all pairs of terms of row [T, R, P] and column [T, R, Q]."""
    # The gradient is written out, since JAX's own gradient of a sum of gathers adds an array of
    # flat's size for every pair.
    terms = _terms(row, column, row_weight, column_weight)
    return functools.reduce(
        jnp.add, (flat.at[i].get(mode="promise_in_bounds") * weight for i, weight in terms)
    )


def _terms(row, column, row_weight, column_weight):
    """Yields indices [R, P, Q] and weights [R, P, Q, 1] for every pair of terms."""
    for i, j in itertools.product(range(len(row)), range(len(column))):
        index = row[i][:, :, None] + column[j][:, None, :]
        weight = row_weight[i][:, :, None] * column_weight[j][:, None, :]
        yield index, weight[..., None]


def _forward(flat, *terms):
    return _weighted_rows(flat, *terms), (flat[:, :0], terms)  # Keeps only the number of rows.


def _backward(residuals, dy):
    rows, terms = residuals
    gradient = jnp.zeros((len(rows), dy.shape[-1]), dy.dtype)
    for index, weight in _terms(*terms):
        gradient = gradient.at[index].add(dy * weight, mode="promise_in_bounds")
    return gradient, *(None,) * len(terms)


_weighted_rows.defvjp(_forward, _backward)
