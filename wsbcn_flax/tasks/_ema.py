"""The exponential moving average (EMA) of parameters, for any task."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from wsbcn_flax.ops._checks import statistics_dtype
from wsbcn_flax.tasks._task import Batch, Loss, Metrics, Task


@struct.dataclass
class Averaged:
    """The ``extra`` of ``Ema``: averages in float32 or wider, and the inner task's ``extra``."""

    params: Any
    batch_stats: Any
    extra: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema(Task):
    """A task that is evaluated with an exponential moving average of its parameters.

    After step k the average a of every parameter or running statistic p becomes
    ``a + (1 - d) * (p - a)`` with ``d = min(decay, (1 + k) / (10 + k))``. Early averages span few
    steps, so that they forget the initialization. Training itself is unchanged.

    Attributes:
        task: Task to train.
        decay: Weight of the past in the average, from 0 to below 1.

    Raises:
        ValueError: If the decay is outside its range.

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992; the
        warm-up of ``d`` is that of TensorFlow's ``ExponentialMovingAverage``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from wsbcn_flax.models import CifarResNet
        >>> from wsbcn_flax.tasks import Classification, Ema
        >>> from wsbcn_flax.training import init_state
        >>> task = Ema(task=Classification(model=CifarResNet(depth=8, width=4)), decay=0.999)
        >>> batch = {"image": jnp.ones((2, 8, 8, 1)), "label": jnp.array([0, 1])}
        >>> state = init_state(task, optax.sgd(0.1), jax.random.key(0), batch)
        >>> sorted(task.for_evaluation(state).params) == sorted(state.params)
        True
    """

    task: Task
    decay: float

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), received {self.decay}.")

    def init(self, key: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Returns the variables of the inner task."""
        return self.task.init(key, batch)

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array, extra: Any
    ) -> tuple[Loss, tuple[Any, Metrics]]:
        """Returns the loss of the inner task."""
        return self.task.loss(params, batch_stats, batch, rng=rng, extra=extra.extra)

    def evaluate(self, params: Any, batch_stats: Any, batch: Batch) -> Any:
        """Returns the evaluation of the inner task."""
        return self.task.evaluate(params, batch_stats, batch)

    def after_update(self, state: Any) -> Averaged:
        """Moves the averages towards the new parameters and statistics."""
        started = isinstance(state.extra, Averaged)
        inside = state.replace(extra=state.extra.extra if started else state.extra)
        extra = self.task.after_update(inside)
        current = (state.params, state.batch_stats)
        if not started:  # Copies: a step that donates its state may be given no buffer twice.
            params, batch_stats = jax.tree.map(lambda x: jnp.array(x, _dtype(x)), current)
            return Averaged(params=params, batch_stats=batch_stats, extra=extra)
        step = state.step.astype(jnp.float32)
        share = 1 - jnp.minimum(self.decay, (1 + step) / (10 + step))

        def moved(average, value):
            if not jnp.issubdtype(value.dtype, jnp.inexact):
                return value
            return average + share.astype(average.dtype) * (value - average)

        averages = jax.tree.map(moved, (state.extra.params, state.extra.batch_stats), current)
        params, batch_stats = averages
        return Averaged(params=params, batch_stats=batch_stats, extra=extra)

    def for_evaluation(self, state: Any) -> Any:
        """Returns the state with the averages in place of parameters and statistics."""
        averages = (state.extra.params, state.extra.batch_stats)
        params, batch_stats = jax.tree.map(
            lambda average, value: average.astype(value.dtype),
            averages,
            (state.params, state.batch_stats),
        )
        inside = state.replace(params=params, batch_stats=batch_stats, extra=state.extra.extra)
        return self.task.for_evaluation(inside)


def _dtype(value: jax.Array) -> jnp.dtype:
    """Returns the dtype of a value's average: small changes would be lost in half precision."""
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return statistics_dtype(value.dtype) if floating else value.dtype
