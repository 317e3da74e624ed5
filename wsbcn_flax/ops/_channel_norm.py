"""Channel normalization after a map of every channel: the form all normalizations here take."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import check_activation, check_groups
from wsbcn_flax.ops._moments import ChannelMoments, known_moments


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
    paper calls channel normalization, in one reduction pass and one elementwise pass. The
    derivative is a closed form (a custom VJP: reverse mode, any number of times).

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
    check_activation(x, caller="channel_norm")
    moments = known_moments(x, None, mask)
    check_groups(x.shape[-1], num_groups, caller="channel_norm")
    return normalize_groups(
        x,
        moments,
        jnp.ones((1, x.shape[-1]), moments.mean.dtype),
        moments.shift,
        scale,
        bias,
        num_groups=num_groups,
        epsilon=epsilon,
        mask=mask,
        dtype=x.dtype,
    )


def normalize_groups(
    x: jax.Array,
    moments: ChannelMoments,
    slope: jax.Array,
    offset: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    num_groups: int,
    epsilon: float,
    mask: jax.Array | None,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Channel normalization of y = slope (x - shift) + offset, whose moments follow from x's.

    With the mean and var of x - shift, and d = offset - E[slope mean + offset] over the group,

        std^2 = E[slope^2 var + (slope mean + d)^2] + epsilon
        out   = (x - shift) slope scale / std + d scale / std + bias

    where E is over the channels of the group: the group's variance is the mean of its channels'
    variances plus the variance of their means (Chan et al.), which stays accurate however far apart
    the channels are. All but the last line is arithmetic on arrays [B, C].

    Args:
        x: [B, ..., C].
        moments: those of x, with the same mask, perhaps ``known_moments``: what flows through them
            here is part of the gradient of x.
        slope: [1 or B, C].
        offset: [1 or B, C].
        scale: [C] or [num_groups], or None for one.
        bias: [C] or [num_groups], or None for zero.
        num_groups: divides C.
        epsilon: added to the group's variance.
        mask: as ``moments`` was given; masked positions count as zero.
        dtype: of the output.
    """
    features = x.shape[-1]
    scale = _per_channel(scale, 1, features, num_groups, moments.mean.dtype, "scale")
    bias = _per_channel(bias, 0, features, num_groups, moments.mean.dtype, "bias")
    # As one array, so that their gradients are summed over samples, and devices, as one; broadcast
    # by an addition, after which a shard_map knows them to vary over devices as x does.
    affine = jnp.stack(jnp.broadcast_arrays(slope, offset, scale, bias))
    affine = affine + jnp.zeros_like(moments.mean)[None]
    return _normalize(num_groups, epsilon, jnp.dtype(dtype), x, mask, moments, affine)


# A custom VJP: autodiff of the formula leaves arithmetic on [B, C] arrays inside the loop over x.
# Every coefficient of x below ends in a division for the same reason: XLA for CPU repeats a cheap
# operation for each element of x, the index arithmetic of groups included, but no division.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalize(num_groups, epsilon, dtype, x, mask, moments, affine):
    return _normalize_forward(num_groups, epsilon, dtype, x, mask, moments, affine)[0]


def _normalize_forward(num_groups, epsilon, dtype, x, mask, moments, affine):
    slope, offset, scale, bias = affine
    features = x.shape[-1]
    d = offset - _spread(_group_mean(slope * moments.mean + offset, num_groups), features)
    var = jnp.square(slope) * moments.var + jnp.square(slope * moments.mean + d)
    std = _spread(jnp.sqrt(_group_mean(var, num_groups) + epsilon), features)
    distance = _distance(x, moments, mask)
    y = distance * _at(x, slope * scale / std) + _at(x, (d * scale + bias * std) / std)
    return y.astype(dtype), (x, mask, moments, slope, d, scale, std)


def _normalize_backward(num_groups, epsilon, dtype, residuals, cotangent):
    """One reduction pass and one elementwise pass, over the cotangent g and over x.

    Two sums over positions, S0 = sum(g) and S1 = sum(g (x - shift)), give the gradients of all
    parameters; with n positions, T = (slope S1 + d S0) / std, and means over the group's channels
    m0 = E[scale S0] / n and m1 = E[scale T] / n,

        dscale  = T,  dbias = S0
        doffset = (scale S0 - n (m0 + m1 (slope mean + d) / std)) / std
        dslope  = (scale S1 - n (m0 mean + m1 (slope (var + mean^2) + d mean) / std)) / std
        dx      = slope / std (scale g - m0 - m1 (slope (x - shift) + d) / std)
    """
    x, mask, moments, slope, d, scale, std = residuals
    axes = tuple(range(1, x.ndim - 1))
    mean, n = moments.mean, math.prod(x.shape[1:-1])
    if moments.weight is not None:
        n = jnp.where(moments.weight > 0, moments.weight, 1)
    g, distance = cotangent.astype(mean.dtype), _distance(x, moments, mask)
    # The barrier keeps XLA from reading g once more, for the sum over samples of its sums.
    s0, s1 = lax.optimization_barrier((jnp.sum(g, axes), jnp.sum(g * distance, axes)))
    t = (slope * s1 + d * s0) / std
    m0 = _spread(_group_mean(scale * s0, num_groups), x.shape[-1]) / n
    m1 = _spread(_group_mean(scale * t, num_groups), x.shape[-1]) / n

    d_offset = (scale * s0 - n * (m0 + m1 * (slope * mean + d) / std)) / std
    square = slope * (moments.var + jnp.square(mean)) + d * mean
    d_slope = (scale * s1 - n * (m0 * mean + m1 * square / std)) / std

    through_moments = distance * _at(x, (-jnp.square(slope) * m1 / std) / std)
    through_moments += _at(x, -slope * (m0 + m1 * d / std) / std)
    dx = g * _at(x, slope * scale / std)
    dx += through_moments if mask is None else mask * through_moments
    if mask is not None:
        dx = jnp.where(mask > 0, dx, 0)
    return dx.astype(x.dtype), None, None, jnp.stack((d_slope, d_offset, t, s0))


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _distance(x: jax.Array, moments: ChannelMoments, mask: jax.Array | None) -> jax.Array:
    """X - shift in the statistics' dtype, with zero for x where it is masked."""
    if mask is not None:
        # Padding may hold NaN, which the sums of the gradient would keep.
        x = jnp.where(mask > 0, x, 0)
    return x.astype(moments.mean.dtype) - _at(x, moments.shift)


def _at(x: jax.Array, values: jax.Array) -> jax.Array:
    """[B, C] values of channels, to be broadcast to the positions of x."""
    return jnp.expand_dims(values, range(1, x.ndim - 1))


def _group_mean(values: jax.Array, num_groups: int) -> jax.Array:
    """[B, C] -> [B, num_groups], the mean over each group's channels."""
    size = values.shape[-1] // num_groups
    return lax.platform_dependent(
        values,
        tpu=lambda values: _product(values, _membership(num_groups, size, values.dtype) / size),
        default=lambda values: jnp.mean(values.reshape(-1, num_groups, size), -1),
    )


def _spread(values: jax.Array, features: int) -> jax.Array:
    """[B, num_groups] -> [B, C], each group's value for each of its channels."""
    batch, num_groups = values.shape
    size = features // num_groups
    grouped = (batch, num_groups, size)
    return lax.platform_dependent(
        values,
        tpu=lambda values: _product(values, _membership(num_groups, size, values.dtype).T),
        default=lambda values: jnp.broadcast_to(values[..., None], grouped).reshape(batch, -1),
    )


# A TPU lays channels out along its vectors' lanes: to split that axis into groups is several copies
# of every array, and a product with a matrix of zeros and ones is one operation.
def _membership(num_groups: int, size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[C, num_groups], one where a channel is a group's."""
    channel = lax.broadcasted_iota(jnp.int32, (num_groups * size, num_groups), 0)
    group = lax.broadcasted_iota(jnp.int32, (num_groups * size, num_groups), 1)
    return (channel // size == group).astype(dtype)


def _product(values: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.matmul(values, matrix, precision=lax.Precision.HIGHEST)


def _per_channel(
    value: jax.Array | None, default: float, features: int, num_groups: int, dtype, name: str
) -> jax.Array:
    """``value`` as [1, C], whichever of [C] and [num_groups] its length is."""
    if value is None:
        return jnp.full((1, features), default, dtype)
    if value.shape == (features,):
        return value.astype(dtype)[None]
    if value.shape == (num_groups,):
        return _spread(value.astype(dtype)[None], features)
    raise ValueError(
        f"The channel part's {name} must have one value per group, ({num_groups},), or per "
        f"channel, ({features},), received shape {value.shape}."
    )
