"""Per-(sample, channel) moments in one pass, shifted so that the variance does not cancel."""

import math
from typing import NamedTuple

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

# Squared distance of a shift from a mean, over the variance, beyond which float32 loses too much of
# the variance for outputs in bfloat16: 2^-24 of that distance is 2^-12 of the variance.
_FAR = 2.0**12


class ChannelMoments(NamedTuple):
    """Moments of an activation [B, ..., C] over its positions, per sample and channel.

    Attributes:
        shift: [B, C] or [1, C], a value of each channel, constant under differentiation.
        mean: [B, C], the mean of x - shift.
        var: [B, C], the biased variance of x, not negative.
        weight: [B, 1], the number of unmasked positions; None without a mask.
    """

    shift: jax.Array
    mean: jax.Array
    var: jax.Array
    weight: jax.Array | None = None


def channel_moments(
    x: jax.Array, *, shift: jax.Array | None = None, mask: jax.Array | None = None
) -> ChannelMoments:
    """Mean and variance of every channel of every sample, from one pass over the activation.

    With c the shift or, without one, the median of three of the sample's values of that channel,

        mean = E[x - c],    var = max(0, E[(x - c)^2] - mean^2),

    in float32 or wider. The variance's relative error grows as (c - E[x])^2 over the variance. A
    typical value of the data keeps that small however far the mean is from zero, and whatever
    single outlier there is. A shift that is known beforehand lets XLA take the moments while it
    computes x.

    Args:
        x: [B, ..., C], floating-point.
        shift: [C] or [B, C], near the channels' means.
        mask: broadcasts to x with a channel axis of 1; true or 1 where a position counts.

    Raises:
        TypeError: if x is not floating-point.
        ValueError: for rank 1, an empty axis, or a shift or mask that does not fit.

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
        shift = typical_values(x, mask)
    elif shift.ndim != 2:
        check_channels(x.shape[-1], caller="channel_moments", shift=shift)
        shift = shift[None]
    return raw_moments(x, shift, mask).moments()


class RawMoments(NamedTuple):
    """Means of one pass over an activation: x - shift and its square, [B, C] each.

    ``shift`` [1 or B, C] and ``weight`` [B, 1] are those of ``ChannelMoments``.
    """

    shift: jax.Array
    mean: jax.Array
    square: jax.Array
    weight: jax.Array | None = None

    def moments(self) -> ChannelMoments:
        """Mean and variance."""
        var = jnp.maximum(self.square - lax.square(self.mean), 0)
        return ChannelMoments(self.shift, self.mean, var, self.weight)


def is_far(moments: ChannelMoments, floor: jax.Array) -> jax.Array:
    """Whether float32 loses some channel's variance to cancellation, 0 or 1, [1, 1].

    So it does where the shift is far from the mean. Variances below ``floor`` [1, C] need not be
    exact.
    """
    far = lax.square(moments.mean) > _FAR * (moments.var + floor)
    return jnp.max(jnp.where(far, 1.0, 0.0), keepdims=True)


def second_pass(x: jax.Array, raw: RawMoments, mask: jax.Array | None) -> RawMoments:
    """The moments about the means that a first pass found."""
    return raw_moments(x, raw.shift + raw.mean, mask)


def raw_moments(x: jax.Array, shift: jax.Array, mask: jax.Array | None) -> RawMoments:
    """The moments of x [B, ..., C] about a shift [1 or B, C]; the mask is full."""
    shift = lax.stop_gradient(shift.astype(statistics_dtype(x.dtype)))
    weight = None if mask is None else jnp.sum(mask, tuple(range(1, x.ndim - 1)))
    return RawMoments(shift, *_means(x, shift, mask, weight), weight)


# A rule of its own: autodiff would keep x - shift in float32 beside x.
@jax.custom_jvp
def _means(x, shift, mask, weight):
    axes = tuple(range(1, x.ndim - 1))
    distance = distance_from(shift, x, mask)
    if mask is None:
        return jnp.mean(distance, axes), jnp.mean(lax.square(distance), axes)
    count = jnp.where(weight > 0, weight, 1)
    mean = jnp.sum(mask * distance, axes) / count
    return mean, jnp.sum(mask * lax.square(distance), axes) / count


@_means.defjvp
def _means_jvp(primals, tangents):
    push_forward = jax.checkpoint(_mean_tangents, prevent_cse=False)
    return _means(*primals), push_forward(*primals, tangents[0])


def _mean_tangents(x, shift, mask, weight, x_tangent):
    """The tangents E[t] and 2 E[(x - shift) t]."""
    distance = distance_from(shift, x, mask)
    tangent = without_padding(x_tangent.astype(distance.dtype), mask)
    total, along = tangent_sums(tangent, distance, mask)
    count = math.prod(x.shape[1:-1])
    if weight is not None:
        count = jnp.where(weight > 0, weight, 1)
    return total / count, 2 * along / count


def tangent_sums(tangent, distance, mask) -> tuple[jax.Array, jax.Array]:
    """Sums of a tangent t and of t (x - shift) over positions that count, [B, C]."""
    axes = tuple(range(1, tangent.ndim - 1))
    tangent = tangent if mask is None else mask * tangent
    return jnp.sum(tangent, axes), jnp.sum(tangent * distance, axes)


def tangents_of_moments(
    total, along, moments: ChannelMoments, count, *, scale: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """The tangents of mean and var, from ``tangent_sums`` over ``count`` positions.

    The sums are divided by ``scale`` first, and multiplied last, for what their transpose ends in.
    """
    if moments.weight is not None:
        count = jnp.where(moments.weight > 0, moments.weight, 1)
    total, along = total / scale, along / scale
    return total * (scale / count), 2 * (along - moments.mean * total) * (scale / count)


def typical_values(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Each channel's median [B, C] of three values, from positions that count; 0 without any.

    In the statistics' dtype. One outlier, wherever it is, is never the median.
    """
    a, b, c = (value.astype(statistics_dtype(x.dtype)) for value in _three_values(x, mask))
    median = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    # A division by one, which XLA for CPU does once, where it would repeat the rest for each
    # element of x.
    return median / jnp.where(jnp.isnan(median), median, 1)


def _three_values(x, mask) -> tuple[jax.Array, ...]:
    """[B, C] each, at a quarter, half and three quarters of the positions along every axis."""
    quarters = (1, 2, 3)
    if mask is None:
        return tuple(x[:, *(n * q // 4 for n in x.shape[1:-1])] for q in quarters)
    valid = mask.reshape(x.shape[0], -1, 1) > 0
    pixels = jnp.where(valid, x.reshape(x.shape[0], -1, x.shape[-1]), 0)
    rank = jnp.cumsum(valid, 1)  # 1 for the first position that counts.
    wanted = (rank[:, -1:] * q // 4 + 1 for q in quarters)
    indices = (jnp.argmax(rank >= jnp.minimum(w, rank[:, -1:]), 1, keepdims=True) for w in wanted)
    return tuple(jnp.take_along_axis(pixels, index, 1)[:, 0] for index in indices)


def distance_from(shift: jax.Array, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """X - shift in the shift's dtype, with zero for x where it is masked."""
    # Select before anything else: padding may hold NaN.
    return without_padding(x, mask).astype(shift.dtype) - at_positions(shift, x)


def without_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """X with zero where it is masked."""
    return x if mask is None else jnp.where(mask > 0, x, jnp.zeros((), x.dtype))


def at_positions(values: jax.Array, x: jax.Array) -> jax.Array:
    """[B, C] or [1, C] values of channels, for the positions of x."""
    return jnp.expand_dims(values, range(1, x.ndim - 1))
