"""Channel normalization after a map of every channel: the form all normalizations here take."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import check_activation, check_groups, check_mask, full_mask
from wsbcn_flax.ops._explicit_axes import devices_that_share_arrays, with_automatic_axes
from wsbcn_flax.ops._moments import (
    ChannelMoments,
    at_positions,
    channel_moments,
    distance_from,
    moment_tangents,
    typical_values,
    without_padding,
)


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
    paper calls channel normalization, in one reduction pass and one elementwise pass. Derivatives
    are a closed form, in reverse and forward mode and of any order.

    Args:
        x: [B, ..., C], floating-point.
        scale: [C], or [num_groups] for one value per group, or None for one.
        bias: [C], or [num_groups], or None for zero.
        num_groups: Number of groups, which divides C and leaves each more than one value.
        epsilon: added to the variance.
        mask: broadcasts to x with a channel axis of 1; positions that count are true or 1.

    Returns:
        An array of x's shape and dtype.

    Raises:
        TypeError: If x is not floating-point, or ``num_groups`` no whole number.
        ValueError: For groups that do not divide C or hold one value, rank 1, an empty axis, or
            arrays and masks of another shape.

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
    check_groups(x.shape, num_groups, caller="channel_norm")
    check_mask(mask, x, caller="channel_norm")
    normalize = functools.partial(_channel_norm, num_groups=num_groups, epsilon=epsilon)
    return with_automatic_axes(normalize, (x, scale, bias, mask), like=x)


def _channel_norm(x, scale, bias, mask, *, num_groups, epsilon):
    mask = full_mask(mask, x)
    # One shift for each group: all that is subtracted below is then near zero.
    shift = _spread(_group_mean(typical_values(x, mask), num_groups), x.shape[-1])
    moments = channel_moments(x, shift=shift, mask=mask)
    return normalize_groups(
        x,
        moments,
        jnp.ones((1, x.shape[-1]), shift.dtype),
        jnp.zeros((1, x.shape[-1]), shift.dtype),
        jnp.zeros((1, x.shape[-1]), shift.dtype),
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
    center: jax.Array,
    constant: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    num_groups: int,
    epsilon: float,
    mask: jax.Array | None,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Channel normalization of y = slope (x - shift + center) + constant, by the moments of x.

    With offset = slope center + constant, the mean and var of x - shift, and
    d = offset - E[slope mean + offset] over the group,

        std^2 = E[slope^2 var + (slope mean + d)^2] + epsilon
        out   = (x - shift) slope scale / std + d scale / std + bias

    where E is over the channels of the group: the group's variance is the mean of its channels'
    variances plus the variance of their means (Chan et al.), which stays accurate however far apart
    the channels are. All but the last line is arithmetic on arrays [B, C].

    Args:
        x: [B, ..., C].
        moments: Moments of x, with the same mask. Their part in the derivative is added to x's.
        slope: [1, C].
        center: [1 or B, C].
        constant: [1, C].
        scale: [C] or [num_groups], or None for one.
        bias: [C] or [num_groups], or None for zero.
        num_groups: divides C.
        epsilon: added to the group's variance.
        mask: as ``moments`` was given; masked positions count as zero.
        dtype: Output dtype.
    """
    features = x.shape[-1]
    scale = _per_channel(scale, 1, features, num_groups, moments.mean.dtype, "scale")
    bias = _per_channel(bias, 0, features, num_groups, moments.mean.dtype, "bias")
    affine = slope, constant, scale, bias
    if devices_that_share_arrays() > 1:
        # As one array, so that their gradients are summed over samples, and devices, as one: XLA
        # combines some 256 arrays into one all-reduce. A split's transpose is one concatenation.
        affine = jnp.broadcast_to(jnp.stack(affine), (4, *moments.mean.shape))
        affine = (part[0] for part in lax.split(affine, (1, 1, 1, 1)))
    affine = (jnp.broadcast_to(part, moments.mean.shape) for part in affine)
    center = jnp.broadcast_to(center, moments.mean.shape)
    return _normalize(num_groups, epsilon, jnp.dtype(dtype), x, mask, moments, (center, *affine))


# A rule of its own, linear in the tangents of x and of the affine map: autodiff of the formula
# leaves arithmetic on [B, C] arrays inside the loop over x. It ignores the tangents of the moments,
# which it takes from that of x, so that one pass over x serves all.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _normalize(num_groups, epsilon, dtype, x, mask, moments, affine):
    slope, offset, _ = _map(num_groups, epsilon, moments.mean, moments.var, affine)
    distance = distance_from(moments.shift, x, mask)
    return (distance * at_positions(slope, x) + at_positions(offset, x)).astype(dtype)


@_normalize.defjvp
def _normalize_jvp(num_groups, epsilon, dtype, primals, tangents):
    x, mask, moments, affine = primals
    y = _normalize(num_groups, epsilon, dtype, *primals)
    # A checkpoint, since autodiff would keep x - shift in float32 beside x.
    push_forward = jax.checkpoint(
        functools.partial(_push_forward, num_groups, epsilon), prevent_cse=False
    )
    return y, push_forward(x, mask, moments, affine, tangents[0], tangents[3]).astype(dtype)


def _push_forward(num_groups, epsilon, x, mask, moments, affine, x_tangent, affine_tangent):
    """The tangent of y = (x - shift) slope + offset, both of which depend on x by its moments.

    Its transpose, which reverse mode takes, is one pass that sums the cotangent g and g (x - shift)
    over positions, arithmetic on [B, C] arrays, and one elementwise pass.
    """
    evaluate = functools.partial(_map, num_groups, epsilon)
    _, _, std = evaluate(moments.mean, moments.var, affine)
    (slope, _, _), (slope_tangent, offset_tangent, _) = jax.jvp(
        evaluate,
        (moments.mean, moments.var, affine),
        (*moment_tangents(x, mask, moments, x_tangent, scale=std), affine_tangent),
    )
    distance = distance_from(moments.shift, x, mask)
    changed = distance * at_positions(slope_tangent, x) + at_positions(offset_tangent, x)
    tangent = without_padding(x_tangent.astype(distance.dtype), mask)
    return tangent * at_positions(slope, x) + changed


def _map(num_groups, epsilon, mean, var, affine):
    """Slope and offset of y as a function of x - shift, and the group's std, all [B, C].

    Every coefficient of x, here and in the derivative, ends in a division by std: XLA for CPU
    repeats a cheap operation for each element of x, that of group indices included, but no
    division.
    """
    center, slope, constant, scale, bias = affine
    features = mean.shape[-1]
    offset = slope * center + constant
    # Only differences within a group matter. Where a running mean is far off they are small numbers
    # beside large ones, which are subtracted first.
    offset = offset - lax.stop_gradient(offset[:, :1])
    d = offset - _spread(_group_mean(slope * mean + offset, num_groups), features)
    square = jnp.square(slope) * var + jnp.square(slope * mean + d)
    std = _spread(jnp.sqrt(_group_mean(square, num_groups) + epsilon), features)
    return slope * scale / std, (d * scale + bias * std) / std, std


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
