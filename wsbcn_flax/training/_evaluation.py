"""Evaluation over a whole dataset, including the last partial batch."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax import lax

from wsbcn_flax.tasks import Batch, Mean, Task
from wsbcn_flax.training._state import TrainState

EvalStep = Callable[[TrainState, Batch], Any]
"""An evaluation step, as returned by ``make_eval_step``."""


class NonFiniteLossError(FloatingPointError):
    """A loss, gradient or metric of training or evaluation was NaN or infinite."""


class Evaluator(Protocol):
    """The interface of evaluators, which compute metrics from the outputs of a task's ``evaluate``.

    An evaluator is made for each evaluation. It runs on the host, in every process, on the outputs
    of all devices.
    """

    def add(self, outputs: Any) -> None:
        """Receives the outputs of one batch, as NumPy arrays."""
        ...

    def result(self) -> Mapping[str, float]:
        """Returns the metrics of all batches."""
        ...


class Average:
    """The evaluator of metrics that are ``Mean``s; it adds them up and divides once.

    Raises:
        ValueError: If there were no batches, the weight of a metric is zero, or a metric is not a
            scalar.

    Example:
        >>> from wsbcn_flax.tasks import Mean
        >>> from wsbcn_flax.training import Average
        >>> average = Average()
        >>> for wrong, size in [(1.0, 4), (1.0, 1)]:
        ...     average.add({"error": Mean(wrong, size), "predicted": [0] * size})
        >>> average.result()
        {'error': 0.4}
    """

    def __init__(self):
        self._sums: dict[str, Mean] = {}

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Adds those outputs of one batch that are ``Mean``s."""
        for name, value in outputs.items():
            if isinstance(value, Mean):
                # Sums over many batches lose digits in float32.
                value = jax.tree.map(lambda x: np.asarray(x, np.float64), value)
                self._sums[name] = self._sums[name] + value if name in self._sums else value

    def result(self) -> dict[str, float]:
        """Returns every mean."""
        empty = [name for name, mean in self._sums.items() if not np.all(mean.weight)]
        if empty or not self._sums:
            raise ValueError(
                "Evaluation needs at least one valid sample, and the batches held none"
                f"{' for ' + ', '.join(empty) if empty else ''}."
            )
        return as_floats({name: mean.total / mean.weight for name, mean in self._sums.items()})


def make_eval_step(task: Task, *, axis_name: str | None = None) -> EvalStep:
    """Makes ``step(state, batch) -> outputs`` from a task, to wrap in ``Partition.compile``.

    ``Mean``s are added up over devices. Predictions [B, ...] are gathered in the batch's order.

    Args:
        task: Task whose ``evaluate`` is called.
        axis_name: Device axis under ``pmap`` or ``shard_map``; None under ``jit``.
    """

    def whole(output: Any) -> Any:
        if isinstance(output, Mean):
            return lax.psum(output, axis_name)
        return lax.all_gather(output, axis_name, tiled=True)

    def step(state: TrainState, batch: Batch) -> Any:
        outputs = task.evaluate(state.params, state.batch_stats, batch)
        if axis_name is None:
            return outputs
        return jax.tree.map(whole, outputs, is_leaf=lambda x: isinstance(x, Mean))

    return step


def evaluate(
    step: EvalStep,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    transform: Callable[[Any], Any] | None = None,
    evaluators: Sequence[Callable[[], Evaluator]] = (Average,),
) -> dict[str, float]:
    """Evaluates a state over all batches.

    Args:
        step: Compiled result of ``make_eval_step``.
        state: State from training or from a checkpoint.
        batches: Batches of the evaluation split.
        transform: Transform params -> params of the training step; applied once, before the first
            batch.
        evaluators: Functions that make the evaluators; the result joins their metrics.

    Raises:
        ValueError: If the batches hold no valid sample, or a metric is not a scalar.
        NonFiniteLossError: If a metric is not finite.

    Example:
        >>> from wsbcn_flax.tasks import Mean
        >>> from wsbcn_flax.training import evaluate
        >>> step = lambda state, batch: {"error": Mean(batch["wrong"], batch["size"])}
        >>> evaluate(step, None, [{"wrong": 1.0, "size": 4}, {"wrong": 1.0, "size": 1}])
        {'error': 0.4}
    """
    if transform is not None:
        state = dataclasses.replace(state, params=jax.jit(transform)(state.params))
    made = [make() for make in evaluators]

    def add(outputs: Any) -> None:
        for evaluator in made:
            evaluator.add(outputs)

    pending = None
    for batch in batches:
        outputs = step(state, batch)
        if pending is not None:  # One batch late, so that the device does not wait for the host.
            add(jax.device_get(pending))
        pending = outputs
    if pending is not None:
        add(jax.device_get(pending))
    metrics = {name: value for each in made for name, value in each.result().items()}
    return check_evaluation(metrics)


def check_evaluation(metrics: Mapping[str, float], *, where: str = "") -> dict[str, float]:
    """Returns the metrics; raises NonFiniteLossError unless all are finite."""
    if bad := non_finite(metrics):
        raise NonFiniteLossError(
            f"Evaluation needs finite metrics, received {bad}{where}. Look for bad values "
            "in the evaluation data, such as NaN or labels outside the classes. If there are none, "
            "the weights or running statistics have diverged: lower the learning rate."
        )
    return dict(metrics)


def as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics as floats; raises ValueError unless all are scalars."""
    values = jax.device_get(dict(metrics))
    if shapes := {name: np.shape(value) for name, value in values.items() if np.ndim(value)}:
        raise ValueError(
            f"Metrics must be scalars, received arrays of the shapes {shapes}. Reduce them over "
            "the batch: means in training, Means in evaluation, or an evaluator of your own."
        )
    return {name: float(value) for name, value in values.items()}


def non_finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics that are NaN or infinite."""
    return {name: value for name, value in metrics.items() if not math.isfinite(value)}
