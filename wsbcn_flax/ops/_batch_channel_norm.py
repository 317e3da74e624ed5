"""Batch-Channel Normalization in the moments form: one reduction pass, one elementwise pass."""

import math
import numbers
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._channel_norm import normalize_groups
from wsbcn_flax.ops._checks import check_activation, check_channels, check_groups
from wsbcn_flax.ops._moments import ChannelMoments, channel_moments, known_moments

Statistics = Literal["batch", "estimate"]
Order = Literal["update_first", "normalize_first"]
Rate = float | Callable[[jax.Array], jax.Array | float]

# Up to this many samples on a chip, XLA for TPU tiles the activation with the batch innermost and
# writes each broadcast [B, C] array out at the activation's size, unless a barrier stands before.
_FEW = 4


class RunningStats(NamedTuple):
    """What training estimates of each channel.

    Attributes:
        mean: [C], the running mean.
        var: [C], the running biased variance.
        count: [], how many updates it has seen, in floating point so that states can be averaged.
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
    order: Order = "update_first",
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
    The mean and variance of the first part are

    * ``statistics="batch"``: those of this batch; gradients flow through them.
    * ``statistics="estimate"``: the running estimates, constants to the gradient. Algorithm 1 of
      the paper: with mu = E[x] and v = E[(x - running.mean)^2] over the batch,
      ``mean += rate (mu - mean)`` and ``var += rate (v - var)``, before normalizing
      (``order="update_first"``) or after (``"normalize_first"``). In the latter order a sample's
      output depends on nothing but itself and ``running``, and the returned statistics are averages
      over samples: the step is the same however the batch is split.

    All statistics are float32 or wider and the running variance is biased, as Flax's is. The
    derivative is a closed form (a custom VJP: reverse mode, any number of times).

    Args:
        x: [B, ..., C], floating-point, of any rank from 2.
        running: the running mean and variance, [C] each.
        num_groups: divides C.
        batch_scale: [C], or None for one.
        batch_bias: [C], or None for zero.
        channel_scale: [C] or, as the authors have it, [num_groups]; None for one.
        channel_bias: [C] or [num_groups]; None for zero.
        statistics: "estimate" or "batch", see above.
        order: "update_first" or "normalize_first"; only "estimate" looks at it.
        rate: the step of the running statistics, 0 to 1, or a schedule from ``running.count``.
        use_running_average: evaluation: normalizes by ``running`` and returns it unchanged.
        axis_name: the device axes of ``pmap`` or ``shard_map`` to average statistics over.
        epsilon: added to both variances.
        mask: broadcasts to x with a channel axis of 1; positions that count are true or 1.
            Statistics weigh every sample by its count; without any, nothing is updated.
        dtype: of the output; that of x if None.

    Returns:
        The output, of x's shape, and the new running statistics.

    Raises:
        TypeError: if x is not floating-point.
        ValueError: for an unknown option, groups that do not divide C, rank 1, an empty axis, a
            rate outside [0, 1], or arrays and masks of another shape.

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
    if x.ndim and _few_on_a_chip(x.shape[0]):
        x = lax.optimization_barrier(x)
    check_activation(x, caller="batch_channel_norm")
    check_channels(x.shape[-1], caller="batch_channel_norm", mean=running.mean, var=running.var)
    # The running mean costs no pass of its own and, where it is far off, float32 cancels less of
    # the variance than rounding x to bfloat16 has added. Wider inputs get a value of their own.
    shift = running.mean if x.dtype == jnp.bfloat16 else None
    if statistics == "batch" and not use_running_average:
        moments = channel_moments(x, shift=shift, mask=mask)
    else:
        moments = known_moments(x, shift, mask)
    check_groups(x.shape[-1], num_groups, caller="batch_channel_norm")
    computed = moments.mean.dtype
    if use_running_average:
        used = new = running
    elif statistics == "batch":
        used, new = _batch_statistics(moments, running, rate, axis_name)
    else:
        new = _updated_estimates(moments, running, rate, axis_name)
        used = new if order == "update_first" else running

    slope = lax.rsqrt(used.var.astype(computed) + epsilon)[None]
    if batch_scale is not None:
        check_channels(x.shape[-1], caller="batch_channel_norm", batch_scale=batch_scale)
        slope = slope * batch_scale.astype(computed)[None]
    offset = slope * (moments.shift - used.mean.astype(computed)[None])
    if batch_bias is not None:
        check_channels(x.shape[-1], caller="batch_channel_norm", batch_bias=batch_bias)
        offset = offset + batch_bias.astype(computed)[None]
    y = normalize_groups(
        x,
        moments,
        slope,
        offset,
        channel_scale,
        channel_bias,
        num_groups=num_groups,
        epsilon=epsilon,
        mask=mask,
        dtype=x.dtype if dtype is None else dtype,
    )
    return y, new


def _few_on_a_chip(samples: int) -> bool:
    """Whether a chip holds few of the samples, which jit spreads over the mesh that is in use."""
    if not isinstance(samples, int):
        return False  # The symbolic batch of an exported program.
    mesh = jax.sharding.get_abstract_mesh()
    return samples <= _FEW * math.prod(mesh.shape[axis] for axis in mesh.auto_axes)


def check_options(*, statistics: str, order: str, rate: Rate, epsilon: float) -> None:
    """Raises ValueError for an option that batch-channel normalization does not know."""
    if statistics not in get_args(Statistics):
        raise ValueError(
            f"statistics must be one of {get_args(Statistics)}, received {statistics!r}."
        )
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, received {order!r}.")
    if isinstance(rate, numbers.Real) and not 0 <= float(rate) <= 1:
        raise ValueError(
            f"rate is the weight of the new statistics, from 0 to 1, received {rate}. "
            "It is one minus Flax's momentum: 0.1 where that is 0.9."
        )
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, received {epsilon}.")


def _updated_estimates(moments, running, rate, axis_name) -> RunningStats:
    """Algorithm 1's estimates: both moments about the old mean, so that they are averages."""
    (distance, square), any_valid = _average(
        lambda delta: (delta, moments.var + lax.square(delta)), moments, running, axis_name
    )
    return _advance(running, rate, any_valid, running.mean + distance, square)


def _batch_statistics(moments, running, rate, axis_name) -> tuple[RunningStats, RunningStats]:
    """This batch's own mean and variance, with gradients, and the running statistics after it."""
    (distance,), any_valid = _average(lambda delta: (delta,), moments, running, axis_name)
    (var,), _ = _average(
        lambda delta: (moments.var + lax.square(delta - distance[None]),),
        moments,
        running,
        axis_name,
    )
    used = RunningStats(running.mean + distance, var, running.count)
    return used, _advance(running, rate, any_valid, used.mean, used.var)


def _average(statistic, moments: ChannelMoments, running: RunningStats, axis_name):
    """Averages [B, C] statistics of delta = E[x] - running.mean over all samples, by their counts.

    Returns the averages, [C] each, and whether any position was valid.
    """
    delta = moments.mean + (moments.shift - running.mean.astype(moments.mean.dtype)[None])
    values = statistic(delta)
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
    """Moves the running statistics towards ``mean`` and ``var``; not at all without valid data."""
    step = jnp.where(any_valid, rate(running.count) if callable(rate) else rate, 0.0)
    mean, var = (lax.stop_gradient(value).astype(running.mean.dtype) for value in (mean, var))
    return RunningStats(
        running.mean + step.astype(running.mean.dtype) * (mean - running.mean),
        running.var + step.astype(running.var.dtype) * (var - running.var),
        running.count + jnp.where(any_valid, 1, 0).astype(running.count.dtype),
    )
