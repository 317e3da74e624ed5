"""Channel normalization, and the form every normalization here is applied in."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import check_groups
from wsbcn_flax.ops._moments import channel_moments


class SampleAffine(NamedTuple):
    """The map x -> slope (x - shift) + offset, each of shape [B, C]."""

    shift: jax.Array
    slope: jax.Array
    offset: jax.Array


def channel_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Normalizes each group of channels of each sample over its positions and channels.

        y = scale (x - E[x]) / sqrt(Var[x] + epsilon) + bias

    with mean and biased variance over (positions, C / num_groups): group normalization, which the
    paper calls channel normalization, in one reduction pass and one elementwise pass.

    Args:
        x: [B, ..., C], floating-point.
        scale: [C], or [num_groups] for one value per group, or None for one.
        bias: [C], or [num_groups], or None for zero.
        num_groups: divides C.
        epsilon: added to the variance.
        mask: broadcasts to x with a channel axis of 1; positions that count are true or 1.

    Returns:
        An array of x's shape and dtype.

    Raises:
        TypeError: if x is not floating-point.
        ValueError: for groups that do not divide C, rank 1, an empty axis, or arrays and masks of
            another shape.

    References:
        Wu, He, Group Normalization, https://arxiv.org/abs/1803.08494

    Example:
        >>> import jax
        >>> from wsbcn_flax.ops import channel_norm
        >>> x = 5 + jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
        >>> y = channel_norm(x, num_groups=3)
        >>> bool(abs(y.reshape(2, 64, 3, 2).mean((1, 3))).max() < 1e-5)
        True
    """
    moments = channel_moments(x, mask=mask)
    check_groups(x.shape[-1], num_groups, caller="channel_norm")
    ones = jnp.ones((), moments.mean.dtype)
    affine = normalize_groups(
        SampleAffine(moments.shift, ones, moments.shift),
        moments.mean,
        moments.var,
        scale,
        bias,
        num_groups=num_groups,
        epsilon=epsilon,
    )
    return apply_affine(x, affine, mask=mask).astype(x.dtype)


def normalize_groups(
    affine: SampleAffine,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    num_groups: int,
    epsilon: float,
) -> SampleAffine:
    """Follows y = affine(x) by channel normalization, given the moments [B, C] of x - shift.

    The group's variance is the mean of its channels' variances plus the variance of their means
    (Chan et al.), which stays accurate however far apart the channels are.
    """
    groups = (mean.shape[0], num_groups, mean.shape[-1] // num_groups)
    channel_mean = (affine.slope * mean + affine.offset).reshape(groups)
    channel_var = (lax.square(affine.slope) * var).reshape(groups)
    group_mean = jnp.mean(channel_mean, -1, keepdims=True)
    spread = lax.square(channel_mean - group_mean)
    inverse = lax.rsqrt(jnp.mean(channel_var + spread, -1, keepdims=True) + epsilon)

    dtype = mean.dtype
    per_group = _per_group(scale, 1, groups, dtype, "scale") * inverse
    slope = jnp.broadcast_to(affine.slope, mean.shape).reshape(groups) * per_group
    offset = jnp.broadcast_to(affine.offset, mean.shape).reshape(groups) - group_mean
    offset = offset * per_group + _per_group(bias, 0, groups, dtype, "bias")
    return SampleAffine(affine.shift, slope.reshape(mean.shape), offset.reshape(mean.shape))


def apply_affine(x: jax.Array, affine: SampleAffine, *, mask: jax.Array | None = None) -> jax.Array:
    """The map on x, computed in the statistics' dtype; masked positions count as zero."""
    axes = tuple(range(1, x.ndim - 1))
    shift, slope, offset = (jnp.expand_dims(array, axes) for array in affine)
    if mask is not None:
        # Padding may hold NaN, which the gradient of the slope would multiply by zero and keep.
        x = jnp.where(mask > 0, x, 0)
    return (x.astype(shift.dtype) - shift) * slope + offset


def _per_group(value, default: float, groups: tuple[int, int, int], dtype, name: str) -> jax.Array:
    """``value`` as [1, G, C / G] or [1, G, 1], whichever of [C] and [G] its length is."""
    _, num_groups, group_size = groups
    if value is None:
        return jnp.full((1, 1, 1), default, dtype)
    if value.shape == (num_groups * group_size,):
        return value.astype(dtype).reshape(1, num_groups, group_size)
    if value.shape == (num_groups,):
        return value.astype(dtype).reshape(1, num_groups, 1)
    raise ValueError(
        f"The channel part's {name} must have one value per group, ({num_groups},), or per "
        f"channel, ({num_groups * group_size},), received shape {value.shape}."
    )
