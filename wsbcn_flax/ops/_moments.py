"""Moments per sample and channel in one pass, without cancellation in the variance.

In float32 the pass sums x - c and (x - c)^2 for a value c of the data. So it must wait for x, and
cannot be part of the convolution that computes x. In bfloat16 it sums x, the leading 8 bits of x^2,
and the rest of x^2. x has 8 significant bits and x^2 has 16. float32, which has 24, adds up 2^16
numbers of 8 bits without rounding if they are about equally large. They are about equally large
where the mean is far from zero compared with the deviation. There cancellation would cost most, and
with exact sums it costs nothing.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import (
    check_activation,
    check_channels,
    check_mask,
    full_mask,
    statistics_dtype,
)


class ChannelMoments(NamedTuple):
    """Moments of an activation [B, ..., C] over its positions, per sample and channel.

    Attributes:
        shift: Value near each channel's mean, [B, C] or [1, C], constant under differentiation.
        mean: Mean of x - shift, [B, C].
        var: Biased variance of x, [B, C], not negative.
        weight: Number of unmasked positions, [B, 1]; None without a mask.
    """

    shift: jax.Array
    mean: jax.Array
    var: jax.Array
    weight: jax.Array | None = None


def channel_moments(
    x: jax.Array, *, shift: jax.Array | None = None, mask: jax.Array | None = None
) -> ChannelMoments:
    """Computes the mean and variance of every channel of every sample in one pass over x.

    With c the shift or, without one, the median of three of the sample's values of that channel,

        mean = E[x - c],    var = max(0, E[(x - c)^2] - mean^2),

    in float32 or wider. The variance's relative error grows as (c - E[x])^2 over the variance. A
    typical value c of the data keeps that small, however far the mean is from zero and despite any
    single outlier. In bfloat16 without a shift, c is the mean, and x and x^2 are summed without
    rounding errors.

    Args:
        x: Activations [B, ..., C], floating-point.
        shift: Values near the channels' means, [C] or [B, C].
        mask: Mask that broadcasts to x with a channel axis of 1; true or 1 where a position counts.

    Raises:
        TypeError: If x is not floating-point.
        ValueError: For rank 1, an empty axis, or a shift or mask that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops import channel_moments
        >>> moments = channel_moments(jnp.array([[[1e4], [1e4 + 1]]]))
        >>> print(moments.shift + moments.mean, moments.var)
        [[10000.5]] [[0.25]]
    """
    check_activation(x, caller="channel_moments")
    check_mask(mask, x, caller="channel_moments")
    mask = full_mask(mask, x)
    if shift is None:
        shift = shift_for(x, mask)
    elif shift.ndim != 2:
        check_channels(x.shape[-1], caller="channel_moments", shift=shift)
        shift = shift[None]
    return raw_moments(x, shift, mask).moments(positions(x))


class RawMoments(NamedTuple):
    """Sums of x - shift and of its square from one pass over an activation, [B, C] each.

    Attributes:
        shift: Shift [1 or B, C]; None for zero, in bfloat16.
        total: Sum of x - shift.
        square: Sum of its square or, without a shift, of the leading bits of each square.
        rest: Sum of the bits that ``square`` leaves out; None with a shift.
        weight: Number of unmasked positions, [B, 1]; None without a mask.
    """

    shift: jax.Array | None
    total: jax.Array
    square: jax.Array
    rest: jax.Array | None
    weight: jax.Array | None

    def moments(self, count: int) -> ChannelMoments:
        """Returns the mean and variance over ``count`` positions, or over the unmasked ones."""
        total, square, weight = self.total, self.square, self.weight
        number = jnp.asarray(divisor(weight, count), total.dtype)
        if self.rest is not None:
            return ChannelMoments(*_exact_moments(number, total, square, self.rest), weight)
        mean = total / number
        var = jnp.maximum(square / number - lax.square(mean), 0)
        assert self.shift is not None
        return ChannelMoments(self.shift, mean, var, weight)


def divisor(weight: jax.Array | None, count: int) -> jax.Array | int:
    """Returns the number to divide sums over positions by: ``count``, or the unmasked ones."""
    return count if weight is None else jnp.where(weight > 0, weight, 1)


def positions(x: jax.Array) -> int:
    """Returns the number of positions of x."""
    return math.prod(x.shape[1:-1])


@jax.custom_jvp
def _exact_moments(count, total, square, rest):
    """Returns the mean m in float32, the part of the mean that m rounds off, and the variance."""
    # With S the total, Sum (x - m)^2 = Sum x^2 - m S - m (S - m count).
    mean = total / count
    remainder = _minus_product(total, 0, mean, count)
    deviations = _minus_product(square, rest, mean, total) - mean * remainder
    return mean, remainder / count, jnp.maximum(deviations / count, 0)


@_exact_moments.defjvp
def _exact_moments_jvp(primals, tangents):
    shift, mean, var = _exact_moments(*primals)
    count, (_, total, square, _) = primals[0], tangents
    pushed = jnp.zeros_like(shift), total / count, (square - 2 * (shift + mean) * total) / count
    return (shift, mean, var), pushed


def _minus_product(value, rest, a, b):
    """Returns value + rest - a b, a small difference, without the product's rounding error."""
    a_high, b_high = (_leading_bits(factor, 12) for factor in (a, b))
    a_low, b_low = a - a_high, b - b_high
    # Products of 12 bits by 12 have no error, whether or not they are fused with a subtraction.
    difference = value - a_high * b_high + rest - a_high * b_low
    return difference - a_low * b_high - a_low * b_low


def _leading_bits(value, count):
    """Rounds a value in float32 to ``count`` significant bits."""
    dropped = 24 - count
    bits = lax.bitcast_convert_type(value, jnp.int32) + (1 << (dropped - 1))
    return lax.bitcast_convert_type(bits & (-1 << dropped), value.dtype)


def shift_for(x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Returns a value of each channel to take moments about; None in bfloat16."""
    return None if x.dtype == jnp.bfloat16 else typical_values(x, mask)


def raw_moments(x: jax.Array, shift: jax.Array | None, mask: jax.Array | None) -> RawMoments:
    """Sums x [B, ..., C] about a shift [1 or B, C] or None; takes a mask from ``full_mask``."""
    if shift is not None:
        shift = lax.stop_gradient(shift.astype(statistics_dtype(x.dtype)))
    weight = None if mask is None else jnp.sum(mask, tuple(range(1, x.ndim - 1)))
    return RawMoments(shift, *_sums(x, shift, mask), weight)


# A custom derivative, since autodiff would keep x - shift in float32 in addition to x.
@jax.custom_jvp
def _sums(x, shift, mask) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    axes = tuple(range(1, x.ndim - 1))
    distance = distance_from(shift, x, mask)
    square = lax.square(distance)
    if shift is None:
        leading = _leading_bits(square, 8)
        return jnp.sum(distance, axes), jnp.sum(leading, axes), jnp.sum(square - leading, axes)
    if mask is not None:
        distance, square = mask * distance, mask * square
    return jnp.sum(distance, axes), jnp.sum(square, axes), None


@_sums.defjvp
def _sums_jvp(primals, tangents):
    push_forward = jax.checkpoint(_sum_tangents, prevent_cse=False)
    sums = _sums(*primals)
    total, square = push_forward(*primals, tangents[0])
    return sums, (total, square, None if sums[2] is None else jnp.zeros_like(total))


def _sum_tangents(x, shift, mask, x_tangent):
    """Computes the tangents sum t and 2 sum (x - shift) t."""
    distance = distance_from(shift, x, mask)
    tangent = without_padding(x_tangent.astype(distance.dtype), mask)
    total, along = tangent_sums(tangent, distance, mask)
    return total, 2 * along


def tangent_sums(tangent, distance, mask) -> tuple[jax.Array, jax.Array]:
    """Sums a tangent t, and t (x - shift), over positions that count, [B, C] each."""
    axes = tuple(range(1, tangent.ndim - 1))
    tangent = tangent if mask is None else mask * tangent
    return jnp.sum(tangent, axes), jnp.sum(tangent * distance, axes)


def tangents_of_moments(
    total, along, moments: ChannelMoments, count
) -> tuple[jax.Array, jax.Array]:
    """Computes the tangents of mean and var from ``tangent_sums`` over ``count`` positions."""
    count = divisor(moments.weight, count)
    return total / count, 2 * (along - moments.mean * total) / count


def typical_values(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns each channel's median [B, C] of three values at positions that count.

    The dtype is that of the statistics. The median is 0 without any such position. A single
    outlier, wherever it is, is never the median.
    """
    a, b, c = (value.astype(statistics_dtype(x.dtype)) for value in _three_values(x, mask))
    median = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    # This divides by one. XLA for CPU computes a division once; without it, XLA would repeat the
    # other operations for each element of x.
    return median / jnp.where(jnp.isnan(median), median, 1)


def _three_values(x, mask) -> tuple[jax.Array, ...]:
    """Picks three values [B, C], at a quarter, half and three quarters of the positions."""
    quarters = (1, 2, 3)  # Along every axis or, with a mask, among the positions that count.
    if mask is None:
        return tuple(x[:, *(_index(n * q // 4) for n in x.shape[1:-1])] for q in quarters)
    valid = mask.reshape(x.shape[0], -1, 1) > 0
    pixels = jnp.where(valid, x.reshape(x.shape[0], -1, x.shape[-1]), 0)
    rank = jnp.cumsum(valid, 1)  # 1 for the first position that counts.
    wanted = (rank[:, -1:] * q // 4 + 1 for q in quarters)
    indices = (jnp.argmax(rank >= jnp.minimum(w, rank[:, -1:]), 1, keepdims=True) for w in wanted)
    return tuple(jnp.take_along_axis(pixels, index, 1)[:, 0] for index in indices)


def _index(place: Any) -> Any:
    """Returns an index; a symbolic one, of an exported program, must be an array."""
    return place if isinstance(place, int) else jnp.asarray(place)


def distance_from(shift: jax.Array | None, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns x - shift in the statistics' dtype, with zero for x where it is masked."""
    # Mask x before anything else: padding may hold NaN.
    x = without_padding(x, mask).astype(statistics_dtype(x.dtype))
    return x if shift is None else x - at_positions(shift, x)


def without_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns x with zero where it is masked."""
    return x if mask is None else jnp.where(mask > 0, x, jnp.zeros((), x.dtype))


def at_positions(values: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes values of channels, [B, C] or [1, C], to broadcast over the positions of x."""
    return jnp.expand_dims(values, range(1, x.ndim - 1))
