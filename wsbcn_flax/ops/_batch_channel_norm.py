"""Batch-Channel Normalization in the moments form: one reduction pass, one elementwise pass."""

import functools
import math
import numbers
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from wsbcn_flax.ops._channel_norm import normalize_groups
from wsbcn_flax.ops._checks import (
    check_activation,
    check_channels,
    check_groups,
    check_mask,
    full_mask,
)
from wsbcn_flax.ops._explicit_axes import devices_that_share_arrays, with_automatic_axes
from wsbcn_flax.ops._moments import ChannelMoments, channel_moments, moments_about

Statistics = Literal["batch", "estimate"]
Order = Literal["update_first", "normalize_first"]
Rate = float | Callable[[jax.Array], jax.Array | float]

_FEW = 4  # Samples on a device.


class RunningStats(NamedTuple):
    """Running statistics of each channel, which training estimates.

    Attributes:
        mean: [C], the running mean.
        var: [C], the running biased variance.
        count: [], the number of updates, in floating point so that states can be averaged.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # as in batch_stats

    @classmethod
    def fresh(cls, features: int, dtype: jax.typing.DTypeLike = jnp.float32) -> "RunningStats":
        """Mean 0, variance 1, count 0."""
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
    """Batch-Channel Normalization: a normalization per channel, then one per sample and group.

        y   = batch_scale (x - mean) / sqrt(var + epsilon) + batch_bias        per channel
        out = channel_scale (y - E[y]) / sqrt(Var[y] + epsilon) + channel_bias

    with E and Var over the positions and channels of each of ``num_groups`` groups of each sample.
    Algorithm 1 of the paper taken literally is ``order="update_first"``; the default makes the step
    the same however the batch is split. The mean and variance of the first part are

    * ``statistics="batch"``: those of this batch; gradients flow through them.
    * ``statistics="estimate"``: the running estimates, constants to the gradient. With
      mu = E[x] and v = E[(x - running.mean)^2] over the batch, ``mean += rate (mu - mean)`` and
      ``var += rate (v - var)``, before normalizing (``order="update_first"``) or after
      (``"normalize_first"``). In the latter order a sample's
      output depends on nothing but itself and ``running``, and the returned statistics are averages
      over samples: the step is the same however the batch is split.

    All statistics are float32 or wider and the running variance is biased, as Flax's is. A channel
    whose moments are not finite (the square of 3e19 overflows float32) leaves its running
    statistics as they are; the output shows it. Derivatives are a closed form, in reverse and
    forward mode and of any order.

    Two things that are not arguments change the rounding, but not the result: the mesh in use,
    ``jax.sharding.get_abstract_mesh()``, over whose automatic axes ``jit`` spreads x, and the
    platform that the program is compiled for. On TPU a barrier precedes few samples; in bfloat16 on
    one device moments are taken about the running mean, elsewhere about a value of the data.

    Args:
        x: [B, ..., C], floating-point, of any rank from 2.
        running: the running mean and variance, [C] each.
        num_groups: Number of groups, which divides C and leaves each more than one value.
        batch_scale: [C], or None for one.
        batch_bias: [C], or None for zero.
        channel_scale: [C] or, as the authors have it, [num_groups]; None for one.
        channel_bias: [C] or [num_groups]; None for zero.
        statistics: "estimate" or "batch", see above.
        order: "normalize_first" or "update_first"; only "estimate" looks at it.
        rate: Step size of the running statistics, from 0 to 1, or a schedule that returns it for
            ``running.count``.
        use_running_average: evaluation: normalizes by ``running`` and returns it unchanged.
        axis_name: Device axes of ``pmap`` or ``shard_map`` to average the batch part's statistics
            over. The channel part is always that of the positions and channels on one device: to
            split these over devices use ``jit`` and shardings, which give the unsplit result.
        epsilon: added to both variances.
        mask: broadcasts to x with a channel axis of 1; positions that count are true or 1.
            Statistics weigh every sample by its count; without any, nothing is updated.
        dtype: Output dtype; defaults to the dtype of ``x``.

    Returns:
        The output, of x's shape, and the new running statistics.

    Raises:
        TypeError: If x is not floating-point, ``num_groups`` not a whole number, or the rate not a
            number.
        ValueError: For an unknown option, groups that do not divide C or hold one value, rank 1, an
            empty axis, a rate outside [0, 1], or arrays and masks of another shape.

    Warns:
        UserWarning: If batch statistics are those of a single value, which is its own mean.

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
        rate=rate,
        axis_name=axis_name,
        epsilon=epsilon,
        dtype=x.dtype if dtype is None else dtype,
    )
    parameters = (batch_scale, batch_bias, channel_scale, channel_bias)
    return with_automatic_axes(normalize, (x, running, *parameters, mask), like=(x, running))


def _batch_channel_norm(
    x,
    running,
    batch_scale,
    batch_bias,
    channel_scale,
    channel_bias,
    mask,
    *,
    num_groups,
    statistics,
    order,
    rate,
    axis_name,
    epsilon,
    dtype,
):
    mask = full_mask(mask, x)
    if _few_on_a_device(x.shape[0]):
        # XLA for TPU tiles so small a batch innermost, and then writes each broadcast [B, C] array
        # out at the activation's size, unless a barrier stands before (libtpu 0.0.42).
        x = lax.platform_dependent(x, tpu=lax.optimization_barrier, default=lambda x: x)
    if x.dtype == jnp.bfloat16 and devices_that_share_arrays() == 1:
        # A ResNet-50 step on a v5e is estimated at 0.91 of the time with moments about values of x,
        # at 2 images. Not over global arrays: whether a mean is far off would be an all-reduce.
        scale = epsilon if statistics == "batch" else running.var + epsilon
        floor = epsilon * jnp.broadcast_to(scale, running.var.shape)
        moments = moments_about(x, running.mean, mask=mask, floor=floor)
    else:
        moments = channel_moments(x, mask=mask)
    computed = moments.mean.dtype
    if statistics == "batch":
        center, var, new = _batch_statistics(moments, running, rate, axis_name)
    else:
        new = running
        if statistics == "estimate":
            new = _updated_estimates(moments, running, rate, axis_name)
        used = new if order == "update_first" else running
        center, var = moments.shift - used.mean.astype(computed)[None], used.var.astype(computed)

    slope = lax.rsqrt(var + epsilon)[None]
    if batch_scale is not None:
        slope = slope * batch_scale.astype(computed)[None]
    constant = jnp.zeros_like(slope)
    if batch_bias is not None:
        constant = batch_bias.astype(computed)[None]
    y = normalize_groups(
        x,
        moments,
        slope,
        center,
        constant,
        channel_scale,
        channel_bias,
        num_groups=num_groups,
        epsilon=epsilon,
        mask=mask,
        dtype=dtype,
    )
    return y, new


def _few_on_a_device(samples: int) -> bool:
    """Whether each device of the current mesh holds at most ``_FEW`` samples."""
    # The batch of an exported program may be symbolic.
    return isinstance(samples, int) and samples <= _FEW * devices_that_share_arrays()


def _updated_estimates(moments, running, rate, axis_name) -> RunningStats:
    """Algorithm 1's estimates: both moments about the old mean, so that they are averages."""
    old = running.mean.astype(moments.mean.dtype)
    (distance, square), any_valid = _average_about(old, moments, axis_name)
    return _advance(running, rate, any_valid, old + distance, square)


def _batch_statistics(moments, running, rate, axis_name):
    """This batch's own mean and variance, with gradients, and the running statistics after it.

    Returns the shift less the mean, [B, C], the variance, [C], and the running statistics. The mean
    is taken twice, the second time about the first: the one rounded at its full size is too coarse
    for a channel that hardly varies.
    """
    old = running.mean.astype(moments.mean.dtype)
    (distance, _), _ = _average_about(old, moments, axis_name)
    about = lax.stop_gradient(old + distance)
    (rest, square), any_valid = _average_about(about, moments, axis_name)
    var = jnp.maximum(square - lax.square(rest), 0)
    new = _advance(running, rate, any_valid, about + rest, var)
    return (moments.shift - about[None]) - rest[None], var, new


def _average_about(center, moments: ChannelMoments, axis_name):
    """Averages E[x] - center and E[(x - center)^2] over all samples, by their counts.

    Returns both, [2, C], and whether any position was valid.
    """
    distance = moments.mean + (moments.shift - center[None])
    values = distance, moments.var + lax.square(distance)
    if moments.weight is None:
        means = [jnp.mean(value, 0) for value in values]
        return means if axis_name is None else lax.pmean(jnp.stack(means), axis_name), True
    # One vector, so that devices with unequal counts still need one all-reduce.
    sums = jnp.stack([jnp.sum(value * moments.weight, 0) for value in values])
    packed = jnp.append(sums.ravel(), jnp.sum(moments.weight))
    packed = packed if axis_name is None else lax.psum(packed, axis_name)
    total = packed[-1]
    return packed[:-1].reshape(sums.shape) / jnp.where(total > 0, total, 1), total > 0


def _advance(running: RunningStats, rate: Rate, any_valid, mean, var) -> RunningStats:
    """Moves the running statistics towards ``mean`` and ``var``.

    Not at all without valid data, and not a channel whose new moments are not finite: they would
    stay in the state for ever.
    """
    dtype = running.mean.dtype
    step = jnp.asarray(rate(running.count) if callable(rate) else rate, dtype)
    mean, var = (lax.stop_gradient(value).astype(dtype) for value in (mean, var))
    moves = any_valid & jnp.isfinite(var)  # It is not finite where the mean is not.
    return RunningStats(
        jnp.where(moves, running.mean + step * (mean - running.mean), running.mean),
        jnp.where(moves, running.var + step * (var - running.var), running.var),
        running.count + jnp.asarray(any_valid, running.count.dtype),
    )


def check_options(*, statistics: str, order: str, rate: Rate, epsilon: float) -> None:
    """Raises for an option that batch-channel normalization does not know.

    Raises:
        TypeError: for a rate, or a value of its schedule, that is not one number.
        ValueError: for an unknown name, or a number outside its range.
    """
    if statistics not in get_args(Statistics):
        raise ValueError(
            f"statistics must be one of {get_args(Statistics)}, received {statistics!r}."
        )
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, received {order!r}.")
    if not callable(rate):
        _check_rate(rate, "rate")
    elif isinstance(rate, Hashable):
        _check_schedule(rate)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, received {epsilon}.")


@functools.lru_cache(maxsize=64)
def _check_schedule(rate: Callable[[jax.Array], Any]) -> None:
    """Evaluates a schedule at some counts: what it returns while it is traced has no value."""
    with jax.ensure_compile_time_eval():
        for count in (0, 1, 1000, 1_000_000):
            _check_rate(rate(jnp.float32(count)), f"rate, a schedule, at count {count},")


def _check_rate(value: Any, name: str) -> None:
    is_number = isinstance(value, numbers.Real) or (
        isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    )
    if not is_number:
        raise TypeError(
            f"{name} must be one number from 0 to 1, or a schedule that returns one, received "
            f"{value!r}."
        )
    if not isinstance(value, Tracer) and not 0 <= float(value) <= 1:
        raise ValueError(
            f"{name} must be the weight of the new statistics, from 0 to 1, received {value}. "
            "It is one minus Flax's momentum: 0.1 where that is 0.9."
        )
