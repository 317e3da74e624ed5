"""Batch-Channel Normalization as an NNX module with nnx.BatchNorm's calling convention."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from wsbcn_flax.layers._batch_channel_norm import Affine
from wsbcn_flax.layers._step_statistics import CallSums
from wsbcn_flax.ops import RunningStats, batch_channel_norm
from wsbcn_flax.ops._checks import check_activation, check_groups, statistics_dtype
from wsbcn_flax.ops._options import Order, Rate, Statistics, check_options


class BatchChannelNorm(nnx.Module):
    """Batch-Channel Normalization (BCN), for training with few images on each chip.

        y   = batch_scale (x - mean) / sqrt(var + epsilon) + batch_bias        per channel
        out = channel_scale (y - E[y]) / sqrt(Var[y] + epsilon) + channel_bias

    with E and Var over the positions and channels of each group of each sample.
    ``wsbcn_flax.batch_channel_norm`` computes the result. The module is called like
    ``nnx.BatchNorm`` and draws as many random numbers. Its ``nnx.Param`` are ``batch_scale`` [C],
    ``batch_bias`` [C], ``channel_scale`` and ``channel_bias`` [num_groups] (or [C] with
    ``affine="channel"``). Its ``nnx.BatchStat`` are ``mean`` [C], ``var`` [C] and ``count`` [].

    Each call in training updates the statistics. Where ``Functional`` runs the model, in a training
    step for instance, all calls read the same statistics and together are one update.

    Args:
        num_features: Number of channels C.
        num_groups: Number of groups of the channel part, which divides C and leaves each more than
            one value.
        statistics: Statistics of the batch part, "estimate" (running estimates also in training) or
            "batch".
        order: Order of update and normalization, "normalize_first" (split-invariant) or
            "update_first" (Algorithm 1).
        rate: Step size of the running statistics, from 0 to 1, or a schedule that returns it for
            their count. It is one minus ``nnx.BatchNorm``'s momentum. Create a schedule only once:
            modules with the same schedule share compiled programs.
        affine: Whether the channel part has a scale and bias per "group" (the authors') or per
            "channel".
        use_running_average: Whether to evaluate, which updates nothing. ``train()``, ``eval()`` and
            ``nnx.view`` set it, and the argument of a call overrides it.
        epsilon: Constant added to both variances.
        dtype: Output dtype; defaults to the dtype of the input.
        param_dtype: Dtype of the parameters; statistics are float32 or wider.
        axis_name: Mapped axes to average the batch part's statistics over, such as the axis of
            ``nnx.vmap`` or ``nnx.pmap`` with shared statistics.
        scale_init: Initializer of ``channel_scale``; zero for the last layer of a residual branch.
        bias_init: Initializer of ``channel_bias``.
        rngs: Random streams.

    Raises:
        TypeError: If the input is not floating-point, ``num_groups`` not a whole number, or the
            rate not a number.
        ValueError: For an unknown option, or groups that do not divide C or hold one value. For
            rank 1, an empty axis, a mask of another shape, or ``use_running_average`` of None. In
            training under ``nnx.vmap``, for statistics shared over the mapped axis without
            ``axis_name``.

    References:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, https://arxiv.org/abs/1903.10520

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from wsbcn_flax.nnx import BatchChannelNorm
        >>> norm = BatchChannelNorm(16, num_groups=4, rngs=nnx.Rngs(0))
        >>> y = norm(jax.random.normal(jax.random.key(0), (1, 8, 8, 16)))
        >>> float(norm.count[...])
        1.0
        >>> norm.eval()
        >>> y = norm(y)
        >>> float(norm.count[...])
        1.0
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        *,
        statistics: Statistics = "estimate",
        order: Order = "normalize_first",
        rate: Rate = 0.1,
        affine: Affine = "group",
        use_running_average: bool | None = False,
        epsilon: float = 1e-5,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        axis_name: str | tuple[str, ...] | None = None,
        scale_init: nnx.Initializer = nnx.initializers.ones,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        check_options(statistics=statistics, order=order, rate=rate, epsilon=epsilon)
        if affine not in get_args(Affine):
            raise ValueError(f"affine must be one of {get_args(Affine)}, received {affine!r}.")
        some_positions = (1, 2, num_features)
        check_groups(some_positions, num_groups, caller="BatchChannelNorm")
        group_shape = (num_groups if affine == "group" else num_features,)
        fresh = RunningStats.fresh(num_features, statistics_dtype(param_dtype))
        self.mean = nnx.BatchStat(fresh.mean)
        self.var = nnx.BatchStat(fresh.var)
        self.count = nnx.BatchStat(fresh.count)
        self.calls: nnx.BatchStat[CallSums] | None = nnx.data(None)  # Set by ``Functional``.
        self.batch_scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.batch_bias = nnx.Param(jnp.zeros(num_features, param_dtype))
        self.channel_scale = nnx.Param(scale_init(rngs.params(), group_shape, param_dtype))
        self.channel_bias = nnx.Param(bias_init(rngs.params(), group_shape, param_dtype))

        self.num_features = num_features
        self.num_groups = num_groups
        self.statistics: Statistics = statistics
        self.order: Order = order
        self.rate = rate
        self.affine = affine
        self.use_running_average = use_running_average
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis_name = axis_name

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes x [B, ..., C].

        Args:
            x: Activations, floating-point.
            use_running_average: Whether to evaluate (true) or to train (false); None takes the
                attribute.
            mask: Mask that broadcasts to x with a channel axis of 1; true or 1 where a position
                counts.

        Returns:
            An array of x's shape, in ``dtype``.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "BatchChannelNorm needs use_running_average, true for evaluation and false for "
                "training, received None. Call model.train() or model.eval(), or pass it here."
            )
        check_activation(x, caller="BatchChannelNorm")
        check_groups(x.shape, self.num_groups, caller="BatchChannelNorm")
        before = RunningStats(self.mean[...], self.var[...], self.count[...])
        y, new = batch_channel_norm(
            x,
            before,
            batch_scale=self.batch_scale[...],
            batch_bias=self.batch_bias[...],
            channel_scale=self.channel_scale[...],
            channel_bias=self.channel_bias[...],
            num_groups=self.num_groups,
            statistics=self.statistics,
            order=self.order,
            rate=self.rate,
            use_running_average=use_running_average,
            axis_name=self.axis_name,
            epsilon=self.epsilon,
            mask=mask,
            dtype=self.dtype,
        )
        if not use_running_average:
            self._record_call(before, new, mask)
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode, for ``nnx.view``."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _record_call(self, before: RunningStats, new: RunningStats, mask: jax.Array | None) -> None:
        """Updates the statistics, or adds this call to the others of a step."""
        if self.calls is not None:
            self.calls.set_value(self.calls.get_value().add(new, mask))
            return
        # JAX cannot transpose a custom vmap rule; statistics have no gradient anyway.
        statistics = _instead_of(*jax.lax.stop_gradient((before, new)))
        self.mean[...], self.var[...], self.count[...] = statistics


@jax.custom_batching.custom_vmap
def _instead_of(before: RunningStats, new: RunningStats) -> RunningStats:
    """Returns the new statistics; raises under vmap where ``before`` is shared."""
    return new


@_instead_of.def_vmap
def _instead_of_mapped(axis_size: int, in_batched: Any, before: Any, new: Any) -> Any:
    if in_batched[1].mean and not in_batched[0].mean:
        raise ValueError(
            "BatchChannelNorm shares its statistics over a mapped axis, and every index along it "
            "would update them differently. Name the axis, BatchChannelNorm(axis_name=...), or map "
            "the statistics too; for evaluation call model.eval()."
        )
    return new, in_batched[1]
