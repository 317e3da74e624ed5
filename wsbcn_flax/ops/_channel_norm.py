"""Channel normalization, which is group normalization."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import (
    check_activation,
    check_channel_part,
    check_groups,
    check_mask,
    full_mask,
)
from wsbcn_flax.ops._explicit_axes import devices_that_share_arrays, with_automatic_axes
from wsbcn_flax.ops._moments import raw_moments, shift_for
from wsbcn_flax.ops._normalize_groups import ChannelMap, normalize_groups, scale_and_bias

_FEW = 4  # Largest number of samples on a device that counts as few.


def channel_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Normalizes each group of channels of each sample over its positions and channels.

        y = scale (x - E[x]) / sqrt(Var[x] + epsilon) + bias

    with mean and biased variance over (positions, C / num_groups). This is group normalization,
    which the paper calls channel normalization, in one reduction pass and one elementwise pass.
    Derivatives are a closed form, in reverse and forward mode and of any order.

    Args:
        x: Activations [B, ..., C], floating-point.
        scale: Scale [C], or [num_groups] for one value per group, or None for one.
        bias: Bias [C], or [num_groups], or None for zero.
        num_groups: Number of groups, which divides C and leaves each more than one value.
        epsilon: Constant added to the variance.
        mask: Mask that broadcasts to x with a channel axis of 1; true or 1 where a position counts.
        dtype: Output dtype; defaults to the dtype of ``x``.

    Returns:
        An array of x's shape.

    Raises:
        TypeError: If x is not floating-point, or ``num_groups`` not a whole number.
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
    check_channel_part(x.shape[-1], num_groups, scale=scale, bias=bias)
    check_mask(mask, x, caller="channel_norm")
    normalize = functools.partial(
        _channel_norm,
        num_groups=num_groups,
        epsilon=float(epsilon),
        dtype=jnp.dtype(x.dtype if dtype is None else dtype),
    )
    return with_automatic_axes(normalize, (x, scale, bias, mask), like=x)


@functools.partial(jax.jit, static_argnames=("num_groups", "epsilon", "dtype"))
def _channel_norm(x, scale, bias, mask, *, num_groups, epsilon, dtype):
    mask = full_mask(mask, x)
    x = tiled_for_few_samples(x)
    y, _ = normalize_groups(
        x,
        raw_moments(x, shift_for(x, mask), mask),
        _identity_of_channels,
        (),
        (row(scale), row(bias)),
        num_groups=num_groups,
        epsilon=epsilon,
        mask=mask,
        dtype=dtype,
    )
    return y


def tiled_for_few_samples(x: jax.Array) -> jax.Array:
    """Puts x behind a barrier on TPU if each device of the mesh holds 2 to ``_FEW`` samples.

    XLA for TPU tiles so few samples innermost. Without a barrier before x, it then writes out each
    broadcast [B, C] array at the activation's size (libtpu 0.0.42). A single sample needs no such
    array; there the barrier would only keep the moments out of the convolution.
    """
    devices, samples = devices_that_share_arrays(), x.shape[0]
    # The batch of an exported program may be symbolic.
    if not isinstance(samples, int) or not devices < samples <= _FEW * devices:
        return x
    return lax.platform_dependent(x, tpu=lax.optimization_barrier, default=lambda x: x)


def _identity_of_channels(moments, constants, parameters, groups):
    one = jnp.ones((1, moments.mean.shape[-1]), moments.mean.dtype)
    # y is x minus one value per group: small numbers, with the same deviations.
    center = moments.shift - groups.average(moments.shift)
    return ChannelMap(center, one, 0 * one, *scale_and_bias(parameters, one, groups)), ()


def row(value: jax.Array | None) -> jax.Array | None:
    """Reshapes [C] to [1, C]; None stays None."""
    return None if value is None else value[None]
