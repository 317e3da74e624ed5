"""Batch-Channel Normalization from moments: one reduction pass and one elementwise pass."""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._channel_norm import row, tiled_for_few_samples
from wsbcn_flax.ops._checks import (
    check_activation,
    check_channel_part,
    check_channels,
    check_groups,
    check_mask,
    full_mask,
)
from wsbcn_flax.ops._explicit_axes import with_automatic_axes
from wsbcn_flax.ops._groups import groups_of
from wsbcn_flax.ops._moments import ChannelMoments, positions, raw_moments, shift_for
from wsbcn_flax.ops._normalize_groups import (
    ChannelMap,
    MapOfChannels,
    as_given,
    normalize_groups,
    scale_and_bias,
)
from wsbcn_flax.ops._options import Order, Rate, Statistics, check_options


class RunningStats(NamedTuple):
    """Running statistics of each channel, which training estimates.

    Attributes:
        mean: Running mean [C].
        var: Running biased variance [C].
        count: Number of updates [], in floating point so that states can be averaged.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # as in batch_stats

    @classmethod
    def fresh(cls, features: int, dtype: jax.typing.DTypeLike = jnp.float32) -> "RunningStats":
        """Returns statistics with mean 0, variance 1 and count 0."""
        return cls(jnp.zeros(features, dtype), jnp.ones(features, dtype), jnp.zeros((), dtype))


def batch_channel_norm(
    x: jax.Array,
    running: RunningStats,
    *,
    num_groups: int,
    batch_scale: jax.Array | None = None,
    batch_bias: jax.Array | None = None,
    channel_scale: jax.Array | None = None,
    channel_bias: jax.Array | None = None,
    statistics: Statistics = "estimate",
    order: Order = "normalize_first",
    rate: Rate = 0.1,
    use_running_average: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, RunningStats]:
    """Normalizes each channel, then each group of each sample: Batch-Channel Normalization.

        y   = batch_scale (x - mean) / sqrt(var + epsilon) + batch_bias        per channel
        out = channel_scale (y - E[y]) / sqrt(Var[y] + epsilon) + channel_bias

    with E and Var over the positions and channels of each of ``num_groups`` groups of each sample.
    ``order="update_first"`` is Algorithm 1 of the paper taken literally. With the default the step
    is the same however the batch is split. The mean and variance of the first part are

    * ``statistics="batch"``: those of this batch; gradients flow through them.
    * ``statistics="estimate"``: the running estimates, through which no gradient flows. With
      mu = E[x] and v = E[(x - running.mean)^2] over the batch, ``mean += rate (mu - mean)`` and
      ``var += rate (v - var)``, before normalizing (``order="update_first"``) or after
      (``"normalize_first"``). In the latter order a sample's output depends only on the sample and
      ``running``, and the returned statistics are averages over samples. So the step is the same
      however the batch is split.

    All statistics are float32 or wider. The running variance is biased, as Flax's is. A channel
    whose moments are not finite (the square of 3e19 overflows float32) leaves its running
    statistics unchanged, but its output shows the overflow. Derivatives are a closed form, in
    reverse and forward mode and of any order.

    Two things that are not arguments change the rounding, but not the result. One is the current
    mesh, ``jax.sharding.get_abstract_mesh()``, over whose automatic axes ``jit`` spreads x. The
    other is the platform that the program is compiled for: on TPU a barrier precedes x where a
    device holds few samples.

    Args:
        x: Activations [B, ..., C], floating-point, of any rank from 2.
        running: Running mean and variance [C] each, and their count.
        num_groups: Number of groups, which divides C and leaves each more than one value.
        batch_scale: Scale of the batch part [C]; None for one.
        batch_bias: Bias of the batch part [C]; None for zero.
        channel_scale: Scale of the channel part, [C] or, as the authors have it, [num_groups]; None
            for one.
        channel_bias: Bias of the channel part, [C] or [num_groups]; None for zero.
        statistics: Statistics of the batch part, "estimate" or "batch" (see above).
        order: Order of update and normalization, "normalize_first" or "update_first"; matters only
            for "estimate".
        rate: Step size of the running statistics, from 0 to 1, or a schedule that returns it for
            ``running.count``.
        use_running_average: Whether to evaluate: normalize by ``running`` and return it unchanged.
        axis_name: Device axes of ``pmap`` or ``shard_map`` to average the batch part's statistics
            over. The channel part always covers the positions and channels on one device. To split
            these over devices use ``jit`` and shardings, which give the unsplit result.
        epsilon: Constant added to both variances.
        mask: Mask that broadcasts to x with a channel axis of 1; true or 1 where a position counts.
            Statistics weigh every sample by its number of such positions. If the batch has none,
            nothing is updated.
        dtype: Output dtype; defaults to the dtype of ``x``.

    Returns:
        The output, of x's shape, and the new running statistics.

    Raises:
        TypeError: If x is not floating-point, ``num_groups`` not a whole number, or the rate not a
            number.
        ValueError: For an unknown option, a rate outside [0, 1], or groups that do not divide C or
            hold one value. For rank 1, an empty axis, or arrays and masks of another shape.

    Warns:
        UserWarning: If batch statistics come from one value per channel, which equals its mean.

    References:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, https://arxiv.org/abs/1903.10520

    Example:
        >>> import jax
        >>> from wsbcn_flax import batch_channel_norm
        >>> from wsbcn_flax.ops import RunningStats
        >>> x = 3 + jax.random.normal(jax.random.key(0), (1, 8, 8, 64))
        >>> y, running = batch_channel_norm(x, RunningStats.fresh(64), num_groups=32)
        >>> y.shape, round(float(running.mean.mean()), 1)
        ((1, 8, 8, 64), 0.3)
    """
    check_options(statistics=statistics, order=order, rate=rate, epsilon=epsilon)
    check_activation(x, caller="batch_channel_norm")
    check_groups(x.shape, num_groups, caller="batch_channel_norm")
    check_mask(mask, x, caller="batch_channel_norm")
    check_channels(
        x.shape[-1],
        caller="batch_channel_norm",
        mean=running.mean,
        var=running.var,
        batch_scale=batch_scale,
        batch_bias=batch_bias,
    )
    check_channel_part(x.shape[-1], num_groups, scale=channel_scale, bias=channel_bias)
    alone = statistics == "batch" and not use_running_average and axis_name is None
    if alone and math.prod(x.shape[:-1]) == 1:
        warnings.warn(
            'statistics="batch" needs more than one value of each channel, received activations '
            f"of shape {x.shape}: all are equal to their mean, and every output is the bias. Use "
            'statistics="estimate", or more samples or positions.',
            stacklevel=2,
        )
    normalize = functools.partial(
        _batch_channel_norm,
        num_groups=num_groups,
        statistics="running" if use_running_average else statistics,
        order=order,
        axis_name=axis_name,
        epsilon=float(epsilon),
        dtype=jnp.dtype(x.dtype if dtype is None else dtype),
    )
    step = jnp.asarray(rate(running.count) if callable(rate) else rate, running.mean.dtype)
    parameters = (batch_scale, batch_bias, channel_scale, channel_bias)
    arrays = (x, running, step, *parameters, mask)
    return with_automatic_axes(normalize, arrays, like=(x, running))


@functools.partial(
    jax.jit,
    static_argnames=("num_groups", "statistics", "order", "axis_name", "epsilon", "dtype"),
)
def _batch_channel_norm(
    x,
    running,
    step,
    batch_scale,
    batch_bias,
    channel_scale,
    channel_bias,
    mask,
    *,
    num_groups,
    statistics,
    order,
    axis_name,
    epsilon,
    dtype,
):
    mask = full_mask(mask, x)
    x = tiled_for_few_samples(x)
    moments = raw_moments(x, shift_for(x, mask), mask)
    constants = step[None, None]
    of_channels = (running.mean, running.var, batch_scale, batch_bias, channel_scale, channel_bias)
    parameters = tuple(map(row, of_channels))
    options = statistics, order, axis_name, epsilon
    map_of_channels: MapOfChannels = functools.partial(_map_of_channels, *options)
    new: Any = None
    if statistics == "batch" or axis_name is not None:
        # Statistics that have gradients, or that devices average, are computed outside a kernel.
        groups = groups_of(num_groups, x.shape[-1])
        known = moments.moments(positions(x))
        parameters, new = map_of_channels(known, constants, parameters, groups)
        map_of_channels, constants = as_given, ()
    y, from_kernel = normalize_groups(
        x,
        moments,
        map_of_channels,
        constants,
        parameters,
        num_groups=num_groups,
        epsilon=epsilon,
        mask=mask,
        dtype=dtype,
    )
    if statistics == "running":
        return y, running
    mean, var, any_valid = from_kernel if new is None else new
    count = running.count + any_valid.reshape(()).astype(running.count.dtype)
    return y, RunningStats(mean[0], var[0], count)


def _map_of_channels(statistics, order, axis_name, epsilon, moments, step, parameters, groups):
    """Returns the batch part as a map of channels, and the new mean, var and validity flag."""
    # All arrays are matrices, [1 or B, C].
    computed = moments.mean.dtype
    mean, var, batch_scale, batch_bias, *channel_part = parameters
    running = mean, var, step
    if statistics == "batch":
        center, var, new = _batch_statistics(moments, running, axis_name)
    else:
        new = ()
        if statistics == "estimate":
            new = _updated_estimates(moments, running, axis_name)
        used_mean, used_var = new[:2] if order == "update_first" and new else (mean, var)
        center, var = moments.shift - used_mean.astype(computed), used_var.astype(computed)
    slope = lax.rsqrt(var + epsilon)
    if batch_scale is not None:
        slope = slope * batch_scale.astype(computed)
    constant = jnp.zeros_like(slope) if batch_bias is None else batch_bias.astype(computed)
    return ChannelMap(center, slope, constant, *scale_and_bias(channel_part, slope, groups)), new


def _updated_estimates(moments, running, axis_name):
    """Updates Algorithm 1's estimates: moments about the old mean are averages over samples."""
    old = running[0].astype(moments.mean.dtype)
    distance, square, any_valid = _average_about(old, moments, axis_name)
    return _advance(running, any_valid, old + distance, square)


def _batch_statistics(moments, running, axis_name):
    """Returns shift - mean [B, C] and var [1, C] of this batch, and the new running statistics."""
    # The mean and variance have gradients. The mean is taken twice, the second time about the
    # first: a mean rounded at its full size is too coarse for a channel that hardly varies.
    old = running[0].astype(moments.mean.dtype)
    distance, _, _ = _average_about(old, moments, axis_name)
    about = lax.stop_gradient(old + distance)
    rest, square, any_valid = _average_about(about, moments, axis_name)
    var = jnp.maximum(square - lax.square(rest), 0)
    new = _advance(running, any_valid, about + rest, var)
    return (moments.shift - about) - rest, var, new


def _average_about(center, moments: ChannelMoments, axis_name):
    """Averages E[x] - center and E[(x - center)^2] over all samples, weighted by their counts.

    Returns both averages, [1, C], and whether any position was valid, [1, 1].
    """
    distance = moments.mean + (moments.shift - center)
    values = distance, moments.var + lax.square(distance)
    if moments.weight is None:
        means = [jnp.mean(value, 0, keepdims=True) for value in values]
        if axis_name is not None:
            means = lax.pmean(jnp.stack(means), axis_name)
        return *means, jnp.ones((1, 1), bool)
    sums = [jnp.sum(value * moments.weight, 0, keepdims=True) for value in values]
    total = jnp.sum(moments.weight, keepdims=True)
    if axis_name is not None:
        # One vector, so that devices with unequal counts still need only one all-reduce.
        packed = lax.psum(jnp.concatenate([*sums, total], 1), axis_name)
        *sums, total = lax.split(packed, (*(value.shape[1] for value in values), 1), 1)
    count = jnp.where(total > 0, total, 1)
    return sums[0] / count, sums[1] / count, total > 0


def _advance(running, any_valid, mean, var):
    """Moves the running statistics towards ``mean`` and ``var``."""
    # Nothing moves without valid data. A channel whose new moments are not finite does not move
    # either: such values would stay in the state for ever.
    old_mean, old_var, step = running
    mean, var = (lax.stop_gradient(value).astype(old_mean.dtype) for value in (mean, var))
    moves = any_valid & jnp.isfinite(var)  # Where the mean is not finite, var is not.
    return (
        jnp.where(moves, old_mean + step * (mean - old_mean), old_mean),
        jnp.where(moves, old_var + step * (var - old_var), old_var),
        any_valid.astype(old_mean.dtype),
    )
