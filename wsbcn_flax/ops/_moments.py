"""Per-(sample, channel) moments in one pass, shifted so that the variance does not cancel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import check_activation, check_channels, check_mask, statistics_dtype


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

    With c the shift or, without one, the channel's value at the sample's first position that counts
    (zero without any),

        mean = E[x - c],    var = max(0, E[(x - c)^2] - mean^2),

    in float32 or wider. A value of the data itself keeps the subtraction from cancelling however
    far the mean is from zero: (c - E[x])^2 is at most the number of positions times the variance.
    A shift that is known beforehand lets XLA take the moments while it computes x; the variance's
    relative error then grows as (c - E[x])^2 over the variance.

    Args:
        x: [B, ..., C], floating-point.
        shift: [C], near the channels' means.
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
    axes = tuple(range(1, x.ndim - 1))
    x = x.astype(statistics_dtype(x.dtype))
    if shift is not None:
        check_channels(x.shape[-1], caller="channel_moments", shift=shift)
        shift = lax.stop_gradient(shift.astype(x.dtype))[None]
    if mask is None:
        if shift is None:
            shift = lax.stop_gradient(x[(slice(None), *(0,) * len(axes))])
        centred = x - jnp.expand_dims(shift, axes)
        mean, square = jnp.mean(centred, axes), jnp.mean(lax.square(centred), axes)
        return ChannelMoments(shift, mean, _variance(mean, square))

    check_mask(mask, x, caller="channel_moments")
    mask = jnp.broadcast_to(mask, (*x.shape[:-1], 1)).astype(x.dtype)
    if shift is None:
        shift = lax.stop_gradient(_first_valid(x, mask))
    # Select before multiplying: padding may hold anything, NaN included.
    centred = jnp.where(mask > 0, x - jnp.expand_dims(shift, axes), 0)
    weight = jnp.sum(mask, axes)
    count = jnp.where(weight > 0, weight, 1)
    mean = jnp.sum(mask * centred, axes) / count
    square = jnp.sum(mask * lax.square(centred), axes) / count
    return ChannelMoments(shift, mean, _variance(mean, square), weight)


# Not a stop_gradient, which would stop the derivatives of a gradient as well.
@jax.custom_vjp
def known_moments(x: jax.Array, shift: jax.Array | None, mask: jax.Array | None) -> ChannelMoments:
    """``channel_moments`` for whoever accounts for them in the gradient of x: none of their own.

    Nothing is kept for a backward pass, where autodiff would keep an array of x's size.
    """
    return channel_moments(x, shift=shift, mask=mask)


known_moments.defvjp(
    lambda x, shift, mask: (channel_moments(x, shift=shift, mask=mask), None),
    lambda residuals, cotangent: (None, None, None),
)


def _first_valid(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Each sample's values [B, C] at its first unmasked position; zero without any."""
    valid = mask.reshape(x.shape[0], -1, 1) > 0
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    first = jnp.take_along_axis(pixels, jnp.argmax(valid, 1, keepdims=True), axis=1)[:, 0]
    return jnp.where(jnp.any(valid, 1), first, 0)


def _variance(mean: jax.Array, square: jax.Array) -> jax.Array:
    return jnp.maximum(square - lax.square(mean), 0)
