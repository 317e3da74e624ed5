"""RoIAlign as products with weights of rows and columns."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import statistics_dtype
from wsbcn_flax.ops.detection._roi_samples import Grid, Rois, axis_weights

_CHUNK = 64  # RoIs at a time; together they hold [chunk, rows, W, C] numbers.


def einsum_roi_align(
    pyramid: Sequence[jax.Array], rois: Rois, *, scales: Sequence[float], grid: Grid
) -> jax.Array:
    """Pools maps [B, H, W, C] in RoIs [R] to features [R, rows, columns, C].

    A bilinear weight is the product of one for the row and one for the column. In images and levels
    other than its own, a RoI's rows have weight zero.
    """
    dtype = pyramid[0].dtype
    count = len(rois.level)
    size = max(min(_CHUNK, count), 1)
    chunks = jax.tree.map(lambda x: _in_chunks(x, size), rois)  # Padding is invalid.
    pyramid = [f.astype(statistics_dtype(dtype)) for f in pyramid]

    def pool_level(rois: Rois, level: int):
        features = pyramid[level]
        images, height, width, _ = features.shape
        y, x = grid.points(rois.boxes * scales[level])
        rows, columns = jnp.mean(axis_weights(y, height), 2), jnp.mean(axis_weights(x, width), 2)
        here = jax.nn.one_hot(rois.image, images, dtype=rows.dtype)
        here = here * (rois.valid & (rois.level == level))[:, None]
        rows = rows[:, :, None] * here[:, None, :, None]
        highest = lax.Precision.HIGHEST  # TPUs would round the weights to bfloat16.
        lines = jnp.einsum("rpbh,bhwc->rpwc", rows, features, precision=highest)
        return jnp.einsum("rpwc,rqw->rpqc", lines, columns, precision=highest)

    def pool(rois: Rois):
        levels = range(len(pyramid))
        return functools.reduce(jnp.add, (pool_level(rois, level) for level in levels))

    pooled = lax.map(pool, chunks)
    return pooled.reshape(-1, *pooled.shape[2:])[:count].astype(dtype)


def _in_chunks(x, size):
    x = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])
