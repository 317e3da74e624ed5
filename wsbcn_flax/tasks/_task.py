"""The interface between a task and the training loop."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from wsbcn_flax.tasks._mean import Mean

Batch = Mapping[str, jax.Array]
"""Arrays by name; the leading axis of all of them is that of the samples."""
Metrics = dict[str, Any]
"""Scalars or ``Mean``s by name."""
Loss = jax.Array | Mean


class Network(Protocol):
    """The interface of a model as two pure functions; every Linen module has it."""

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the model's variables from a key and inputs."""
        ...

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with variables and inputs."""
        ...


class LossFn(Protocol):
    """The interface of a loss function, which ``make_train_step`` takes in place of a task."""

    def __call__(
        self, params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array
    ) -> tuple[Loss, tuple[Any, Metrics]]:
        """Returns the batch's loss, and its new batch_stats and metrics."""
        ...


class Task(Protocol):
    """A model with its loss and its evaluation, as pure functions of parameters and statistics.

    A class that inherits from this one has default hooks ``after_update`` and ``for_evaluation``,
    which change nothing. Any object with the first three methods is a task too. Losses and metrics
    are scalar means over the samples of the batch, or a ``Mean`` if samples differ in weight. Then
    the training step is the same however the batch is split.

    The state that the hooks receive is ``wsbcn_flax.training.TrainState``. Its ``extra`` belongs to
    the task and may be a target network or an average of parameters. It is never averaged over
    micro-batches or devices, and no gradient flows through it.
    """

    def init(self, key: jax.Array, batch: Batch) -> Mapping[str, Any]:
        """Returns the variables of the model for batches shaped like ``batch``.

        They are ``params``, and ``batch_stats`` and ``extra`` if the task has them. The values of
        the batch do not matter.
        """
        ...

    def loss(
        self, params: Any, batch_stats: Any, batch: Batch, *, rng: jax.Array, extra: Any
    ) -> tuple[Loss, tuple[Any, Metrics]]:
        """Returns the batch's loss, and its new batch_stats and metrics."""
        ...

    def evaluate(self, params: Any, batch_stats: Any, batch: Batch) -> Any:
        """Returns a pytree of ``Mean``s and predictions.

        ``Mean``s are added up over devices and batches. A prediction is an array [B, ...] of fixed
        shape, one row for each sample of the batch.
        """
        ...

    def after_update(self, state: Any) -> Any:
        """Returns the new ``extra``; called once per step, after the optimizer.

        It is also called once on the state before the first step.
        """
        return state.extra

    def for_evaluation(self, state: Any) -> Any:
        """Returns the state whose ``params`` and ``batch_stats`` are evaluated and exported."""
        return state
