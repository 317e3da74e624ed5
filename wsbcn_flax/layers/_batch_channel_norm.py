"""Batch-Channel Normalization as a Linen module with nn.BatchNorm's calling convention."""

import weakref
from collections.abc import Iterable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from wsbcn_flax.layers._step_statistics import CALLS, CallSums
from wsbcn_flax.ops import RunningStats, batch_channel_norm
from wsbcn_flax.ops._checks import check_activation, check_groups, statistics_dtype
from wsbcn_flax.ops._options import Order, Rate, Statistics, check_options

Affine = Literal["group", "channel"]

# Maps the root scope of an `apply` and a layer's path to the statistics that `apply` received and
# the sums of the calls since. Flax has no place for state that must not leave an `apply`.
_calls_of_an_apply: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class BatchChannelNorm(nn.Module):
    """Batch-Channel Normalization (BCN), for training with few images on each chip.

        y   = batch_scale (x - mean) / sqrt(var + epsilon) + batch_bias        per channel
        out = channel_scale (y - E[y]) / sqrt(Var[y] + epsilon) + channel_bias

    with E and Var over the positions and channels of each group of each sample.
    ``order="update_first"`` is Algorithm 1 of the paper taken literally. With the default the
    training step is the same however the batch is split. ``wsbcn_flax.batch_channel_norm`` computes
    the result. The parameters are ``batch_scale`` [C], ``batch_bias`` [C], ``channel_scale`` and
    ``channel_bias`` [num_groups] (or [C] with ``affine="channel"``). The collection ``batch_stats``
    has ``mean`` [C], ``var`` [C] and ``count`` []; ``apply(..., mutable=["batch_stats"])`` returns
    them updated. Initialization updates nothing.

    A layer may be called several times in one `apply` (a head shared by the levels of a pyramid,
    two views of an image). Each call normalizes by the statistics that `apply` received, and all
    calls are one update: the mean of the statistics that each call would have made. A lifted
    transform around the layer (`nn.remat`, `nn.scan`) begins an `apply` of its own. In
    ``make_train_step`` this makes no difference, since the step adds the calls up itself.

    Attributes:
        num_groups: Number of groups of the channel part, which divides C and leaves each more than
            one value.
        statistics: Statistics of the batch part, "estimate" (running estimates also in training) or
            "batch".
        order: Order of update and normalization, "normalize_first" (split-invariant) or
            "update_first" (Algorithm 1).
        rate: Step size of the running statistics, from 0 to 1, or a schedule that returns it for
            their count. It is one minus ``nn.BatchNorm``'s momentum.
        affine: Whether the channel part has a scale and bias per "group" (the authors') or per
            "channel".
        axis_name: Device axes of ``pmap`` or ``shard_map`` to average the batch part's statistics
            over. The channel part always covers the data on one device. Where positions or channels
            are split over devices use ``jit`` and shardings, and leave this None.
        epsilon: Constant added to both variances.
        dtype: Output dtype; defaults to the dtype of ``x``.
        param_dtype: Dtype of the parameters.
        use_running_average: Whether to evaluate, which updates nothing. Set it here or in the call.
        scale_init: Initializer of ``channel_scale``; zero for the last layer of a residual branch.
        bias_init: Initializer of ``channel_bias``.

    Raises:
        TypeError: If x is not floating-point, ``num_groups`` not a whole number, or the rate not a
            number.
        ValueError: For an unknown option, or groups that do not divide C or hold one value. For
            rank 1, an empty axis, a mask of another shape, missing statistics, or training without
            ``mutable=["batch_stats"]``.

    References:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, https://arxiv.org/abs/1903.10520

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax import BatchChannelNorm
        >>> norm = BatchChannelNorm(num_groups=4, use_running_average=False)
        >>> x = jax.random.normal(jax.random.key(0), (1, 8, 8, 16))
        >>> variables = norm.init(jax.random.key(1), x)
        >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
        >>> variables = {**variables, **updates}
        >>> float(variables["batch_stats"]["count"])
        1.0
    """

    num_groups: int = 32
    statistics: Statistics = "estimate"
    order: Order = "normalize_first"
    rate: Rate = 0.1
    affine: Affine = "group"
    axis_name: str | tuple[str, ...] | None = None
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    use_running_average: bool | None = None
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    def __post_init__(self):
        check_options(
            statistics=self.statistics, order=self.order, rate=self.rate, epsilon=self.epsilon
        )
        if self.affine not in get_args(Affine):
            raise ValueError(f"affine must be one of {get_args(Affine)}, received {self.affine!r}.")
        super().__post_init__()

    @nn.compact
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
            use_running_average: Whether to evaluate (true) or to train (false). Set it here or as
                an attribute.
            mask: Mask that broadcasts to x with a channel axis of 1; true or 1 where a position
                counts.

        Returns:
            An array of x's shape, in ``dtype``.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        check_activation(x, caller="BatchChannelNorm")
        features = x.shape[-1]
        check_groups(x.shape, self.num_groups, caller="BatchChannelNorm")
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        group_shape = (self.num_groups if self.affine == "group" else features,)
        parameters = {
            "batch_scale": self.param("batch_scale", ones, (features,), self.param_dtype),
            "batch_bias": self.param("batch_bias", zeros, (features,), self.param_dtype),
            "channel_scale": self.param(
                "channel_scale", self.scale_init, group_shape, self.param_dtype
            ),
            "channel_bias": self.param(
                "channel_bias", self.bias_init, group_shape, self.param_dtype
            ),
        }
        running = self._running_stats(features, needs_update=not use_running_average)
        before = self._statistics_before(running)
        y, new = batch_channel_norm(
            x,
            before,
            **parameters,
            num_groups=self.num_groups,
            statistics=self.statistics,
            order=self.order,
            rate=self.rate,
            use_running_average=use_running_average,
            axis_name=None if self.is_initializing() else self.axis_name,
            epsilon=self.epsilon,
            mask=mask,
            dtype=self.dtype,
        )
        if not (use_running_average or self.is_initializing()):
            self._record_call(running, before, new, mask)
        return y

    def _statistics_before(self, running: Iterable[nn.Variable]) -> RunningStats:
        """Returns the statistics that `apply` received, before any updates by earlier calls."""
        stats = RunningStats(*(variable.value for variable in running))
        if self.has_variable("batch_stats", CALLS):
            return stats  # In a training step no call changes these.
        return self._calls_of_this_apply().get(self.path, (stats, None))[0]

    def _record_call(
        self,
        running: Iterable[nn.Variable],
        before: RunningStats,
        new: RunningStats,
        mask: jax.Array | None,
    ) -> None:
        """Adds this call to the earlier ones of a training step or of this `apply`."""
        if self.has_variable("batch_stats", CALLS):
            calls = self.get_variable("batch_stats", CALLS)
            self.put_variable("batch_stats", CALLS, calls.add(new, mask))
            return
        of_this_apply = self._calls_of_this_apply()
        is_first = self.path not in of_this_apply
        _, calls = of_this_apply.get(self.path, (before, CallSums.zero(before)))
        calls = calls.add(new, mask)
        of_this_apply[self.path] = before, calls
        after = new if is_first else calls.statistics(before)
        for variable, value in zip(running, after, strict=True):
            variable.value = value

    def _calls_of_this_apply(self) -> dict[Any, tuple[RunningStats, CallSums]]:
        assert self.scope is not None
        return _calls_of_an_apply.setdefault(self.scope.root, {})

    def _running_stats(self, features: int, *, needs_update: bool) -> tuple[nn.Variable, ...]:
        path = "/".join(self.path) or type(self).__name__
        missing = [n for n in RunningStats._fields if not self.has_variable("batch_stats", n)]
        if missing and not self.is_initializing():
            whole = len(missing) == len(RunningStats._fields)
            raise ValueError(
                f"{path} needs its running statistics mean, var and count, and `apply` received no "
                f"{'batch_stats' if whole else ' or '.join(missing)} for it. "
                'Pass {"params": params, "batch_stats": batch_stats}, both from `init`. '
                'The statistics of nn.BatchNorm have no count; add jnp.zeros(()) as "count".'
            )
        if needs_update and not self.is_mutable_collection("batch_stats"):
            raise ValueError(
                f"{path} updates its running statistics in training, and `apply` was called with "
                "batch_stats immutable. Call `y, updates = model.apply(variables, x, "
                'mutable=["batch_stats"])` and carry updates["batch_stats"] to the next step; '
                "for evaluation pass use_running_average=True."
            )
        fresh = RunningStats.fresh(features, statistics_dtype(self.param_dtype))
        return tuple(
            self.variable("batch_stats", name, lambda value=value: value)
            for name, value in fresh._asdict().items()
        )
