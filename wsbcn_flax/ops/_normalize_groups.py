"""Normalization of groups after a map of each channel, the form of all normalizations here."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._explicit_axes import devices_that_share_arrays
from wsbcn_flax.ops._groups import Groups, groups_in_kernel, groups_of
from wsbcn_flax.ops._moments import (
    ChannelMoments,
    RawMoments,
    at_positions,
    distance_from,
    divisor,
    positions,
    tangent_sums,
    tangents_of_moments,
    without_padding,
)
from wsbcn_flax.ops._one_kernel import (
    fit_at_once,
    in_one_kernel,
    linear_with_transpose,
    only,
    whole_kernel,
)


class ChannelMap(NamedTuple):
    """A map y = slope (x - shift + center) + constant of channels, and the channel part's affine.

    All arrays are [1 or B, C]; ``scale`` and ``bias`` apply after the groups are normalized.
    """

    center: jax.Array
    slope: jax.Array
    constant: jax.Array
    scale: jax.Array
    bias: jax.Array


# (moments, constants, parameters, groups) -> (map, auxiliary results). On a TPU this function and
# its derivative with respect to the parameters are part of the kernel. So it takes and returns
# matrices, and its only sums are over samples.
MapOfChannels = Callable[[ChannelMoments, Any, Any, Groups], tuple[ChannelMap, Any]]


class _Static(NamedTuple):
    """The arguments that are not arrays."""

    map_of_channels: MapOfChannels
    num_groups: int
    epsilon: float
    size: int  # Number of positions of x.


def scale_and_bias(parameters, like: jax.Array, groups: Groups) -> tuple[jax.Array, jax.Array]:
    """Returns the channel part's scale and bias [1, C], from [1, C], [1, num_groups] or None."""

    def of_channels(value, default):
        if value is None:
            return jnp.full_like(like, default)
        value = value.astype(like.dtype)
        return value if value.shape == like.shape else groups.spread(value)

    scale, bias = parameters
    return of_channels(scale, 1), of_channels(bias, 0)


def normalize_groups(
    x: jax.Array,
    moments: RawMoments,
    map_of_channels: MapOfChannels,
    constants: Any,
    parameters: Any,
    *,
    num_groups: int,
    epsilon: float,
    mask: jax.Array | None,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, Any]:
    """Normalizes the groups of y = slope (x - shift + center) + constant by the moments of x.

    With offset = slope center + constant, the mean and var of x - shift, and
    d = offset - E[slope mean + offset] over the group,

        std^2 = E[slope^2 var + (slope mean + d)^2] + epsilon
        out   = (x - shift) slope scale / std + d scale / std + bias

    where E is over the channels of the group. The group's variance is the mean of its channels'
    variances plus the variance of their means (Chan et al.). This stays accurate however far apart
    the channels are. All but the last line is arithmetic on arrays [B, C].

    Args:
        x: Activations [B, ..., C].
        moments: Moments of x with the same mask. The derivative of x includes their part.
        map_of_channels: Function that computes the map and auxiliary results.
        constants: Matrices for ``map_of_channels`` that have no gradient.
        parameters: Matrices for ``map_of_channels`` that have a gradient.
        num_groups: Number of groups; divides C.
        epsilon: Constant added to the group's variance.
        mask: Mask that ``moments`` were taken with; x counts as zero at masked positions.
        dtype: Output dtype.

    Returns:
        The output and the auxiliary results, which have no gradient.
    """
    of_all_devices: Any = None
    if devices_that_share_arrays() > 1:
        groups = groups_of(num_groups, x.shape[-1])
        channel_map, of_all_devices = map_of_channels(
            moments.moments(positions(x)), constants, parameters, groups
        )
        # One stacked array, so that one sum reduces their gradients over samples and devices: XLA
        # combines some 256 arrays into one all-reduce. A split's transpose is one concatenation.
        center, *affine = channel_map
        affine = jnp.broadcast_to(jnp.stack(affine), (4, *moments.total.shape))
        slope, constant, scale, bias = (part[0] for part in lax.split(affine, (1, 1, 1, 1)))
        map_of_channels, constants = as_given, ()
        parameters = ChannelMap(center, slope, constant, scale, bias)
    static = _Static(map_of_channels, num_groups, epsilon, positions(x))
    y, aux = _normalize(static, jnp.dtype(dtype), x, mask, moments, constants, parameters)
    return y, aux if of_all_devices is None else of_all_devices


def as_given(moments, constants, parameters, groups):
    """Returns a map of channels that is already known, as a ``MapOfChannels``."""
    return parameters, ()


# A custom derivative, linear in the tangents of x and of the parameters. Autodiff of the formula
# leaves arithmetic on [B, C] arrays inside the loop over x. This rule ignores the given tangents of
# the moments and computes them from the tangent of x, so that one pass over x serves all.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalize(static, dtype, x, mask, *residuals):
    shift, slope, offset, aux = _coefficients(static, residuals)
    return _apply(x, mask, shift, slope, offset, dtype), aux


@_normalize.defjvp
def _normalize_jvp(static, dtype, primals, tangents):
    x, mask, *residuals = primals
    shift, slope, offset, aux = _coefficients(static, residuals)
    y = _apply(x, mask, shift, slope, offset, dtype)
    # Without the checkpoint, autodiff would keep x - shift in float32 in addition to x.
    push_forward = jax.checkpoint(functools.partial(_push_forward, static), prevent_cse=False)
    x_tangent, *_, parameter_tangents = tangents
    pushed = push_forward(x, mask, residuals, shift, slope, x_tangent, parameter_tangents)
    return (y, aux), (pushed.astype(dtype), jax.tree.map(jnp.zeros_like, aux))


def _apply(x, mask, shift, slope, offset, dtype):
    distance = distance_from(shift, x, mask)
    return (distance * at_positions(slope, x) + at_positions(offset, x)).astype(dtype)


def _push_forward(static, x, mask, residuals, shift, slope, x_tangent, parameter_tangents):
    """Computes the tangent of y = (x - shift) slope + offset; x's moments set slope and offset."""
    # Reverse mode takes the transpose: one pass that sums the cotangent g and g (x - shift) over
    # positions, arithmetic on [B, C] arrays, and one elementwise pass. In bfloat16 the first pass
    # sums g x, since XLA for GPU would write out g (x - shift) in float32.
    distance = distance_from(shift, x, mask)
    tangent = without_padding(x_tangent.astype(distance.dtype), mask)
    by_kernel = functools.partial(_pulled_by_kernel, static)
    slope_tangent, offset_tangent = linear_with_transpose(
        functools.partial(_coefficient_tangents, static),
        functools.partial(_pulled_coefficients, groups_of, static),
        residuals,
        (*tangent_sums(tangent, distance, mask), parameter_tangents),
        kernel=by_kernel if fit_at_once(residuals) else None,
    )
    distance = distance_from(residuals[0].shift, x, mask)
    changed = distance * at_positions(slope_tangent, x) + at_positions(offset_tangent, x)
    return tangent * at_positions(slope, x) + changed


def _coefficients(static, residuals):
    """Returns the shift, slope and offset of y = (x - shift) slope + offset, and auxiliaries."""
    plain = functools.partial(_evaluate, groups_of, static)
    run: Callable[..., Any] = plain
    if fit_at_once(residuals):
        in_kernel = functools.partial(_evaluate, groups_in_kernel, static)
        run = functools.partial(in_one_kernel, plain, functools.partial(whole_kernel, in_kernel))
    found, *coefficients, aux = run(residuals)
    given = residuals[0].shift
    return found if given is None else given, *coefficients, aux


def _evaluate(groups, static, residuals):
    raw, constants, parameters = residuals
    moments = raw.moments(static.size)
    groups = groups(static.num_groups, moments.mean.shape[-1])
    channel_map, aux = static.map_of_channels(moments, constants, parameters, groups)
    slope, offset = _map(groups, static.epsilon, moments.mean, moments.var, channel_map)
    # A given shift is known outside; the kernel need not return it.
    return moments.shift if raw.shift is None else (), slope, offset, aux


def _map(groups, epsilon, mean, var, channel_map):
    """Returns the slope and offset of y as a function of x - shift, [B, C]."""
    # Every coefficient of x, here and in the derivative, ends in a division by std. XLA for CPU
    # repeats cheap operations, even those on group indices, for each element of x, but no division.
    slope, d, _, std = _deviations(groups, epsilon, mean, var, channel_map)
    scale, bias = channel_map.scale, channel_map.bias
    return slope * scale / std, (d * scale + bias * std) / std


def _deviations(groups, epsilon, mean, var, channel_map):
    """Returns the slope, d, slope mean + d, and the group's std, all [B, C]."""
    center, slope, constant = (jnp.broadcast_to(part, mean.shape) for part in channel_map[:3])
    offset = slope * center + constant
    # Only differences within a group matter. Where a running mean is far off, they are small beside
    # the offsets themselves, so one channel's offset is subtracted first.
    offset = offset - lax.stop_gradient(offset[:, :1])
    d = offset - groups.average(slope * mean + offset)
    centred = slope * mean + d
    square = jnp.square(slope) * var + jnp.square(centred)
    return slope, d, centred, jnp.sqrt(groups.average(square) + epsilon)


def _coefficient_tangents(static, residuals, linear):
    """Computes the tangents of slope and offset from two sums over x and parameter tangents."""
    # Here y is a function of x minus the given shift, which is zero in bfloat16.
    raw, constants, parameters = residuals
    total, along, parameter_tangents = linear
    moments = raw.moments(static.size)
    groups = groups_of(static.num_groups, moments.mean.shape[-1])

    def evaluate(mean, var, parameters):
        at = moments._replace(mean=mean, var=var)
        channel_map, _ = static.map_of_channels(at, constants, parameters, groups)
        return _map(groups, static.epsilon, mean, var, channel_map)

    primals = moments.mean, moments.var, parameters
    tangents = tangents_of_moments(total, along, moments, static.size)
    slope, offset = jax.jvp(evaluate, primals, (*tangents, parameter_tangents))[1]
    if raw.shift is None:
        offset = offset - moments.shift * slope
    return slope, offset


def _pulled_by_kernel(static, wanted, residuals, cotangents):
    def pulled(*arguments):
        return only(wanted, _pulled_coefficients(groups_in_kernel, static, *arguments))

    return whole_kernel(pulled, residuals, cotangents)


def _pulled_coefficients(groups, static, residuals, cotangents):
    """Applies the transpose of ``_coefficient_tangents``, in closed form.

    Let s and o be the cotangents of y's slope and offset. Over the group, let
    p = E[(s slope + o d) scale / std] and e = E[o scale / std]. Let m = slope mean + d, whose group
    mean is zero. The cotangents of the map's offset and slope are

        o'     = o scale / std - p m / std^2 - e
        slope' = s scale / std - p slope var / std^2 - mean (p m / std^2 + e) + o' center

    The cotangents of the mean and var of x, from which those of the two sums follow, are

        var'   = -p slope^2 / (2 std^2),    mean' = -slope (p m / std^2 + e)
    """
    raw, constants, parameters = residuals
    of_slope, of_offset = cotangents
    moments = raw.moments(static.size)
    if raw.shift is None:
        of_slope = of_slope - moments.shift * of_offset
    mean, var = moments.mean, moments.var
    groups = groups(static.num_groups, mean.shape[-1])
    channel_map, pull = jax.vjp(
        lambda parameters: static.map_of_channels(moments, constants, parameters, groups)[0],
        parameters,
    )
    slope, d, centred, std = _deviations(groups, static.epsilon, mean, var, channel_map)
    center, scale = channel_map.center, channel_map.scale
    # Divide by std first, even for the bias. Otherwise a cotangent that is a plain sum of another
    # array over samples would make XLA take one more pass over that array.
    of_slope, of_offset = of_slope / std, of_offset / std
    of_scale = of_slope * slope + of_offset * d
    of_d = of_offset * scale
    of_std, of_mean_d = groups.average(of_scale * scale), groups.average(of_d)
    by_std = of_std / std
    of_mean_by_slope = by_std * centred / -std - of_mean_d
    of_constant = of_d + of_mean_by_slope
    of_map = ChannelMap(
        of_constant * slope,
        of_slope * scale
        - by_std * slope * var / std
        + of_mean_by_slope * mean
        + of_constant * center,
        of_constant,
        of_scale,
        of_offset * std,
    )
    (of_parameters,) = pull(
        jax.tree.map(
            lambda part, cotangent: (
                cotangent if part.shape == cotangent.shape else jnp.sum(cotangent, 0, keepdims=True)
            ),
            channel_map,
            of_map,
        )
    )
    count = divisor(moments.weight, static.size)
    of_total = -slope * (by_std * d + of_mean_d * std) / count / std
    of_along = -jnp.square(slope) * by_std / count / std
    return of_total, of_along, of_parameters
