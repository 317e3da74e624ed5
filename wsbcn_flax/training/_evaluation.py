"""Evaluation over a full set, the last partial batch included."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from wsbcn_flax.training._micro_batches import Batch, Metrics
from wsbcn_flax.training._state import TrainState
from wsbcn_flax.training._tasks import Task

EvalStep = Callable[[TrainState, Batch], Metrics]


class NonFiniteLossError(FloatingPointError):
    """A loss, gradient or metric of training or evaluation was NaN or infinite."""


def make_eval_step(task: Task, *, axis_name: str | None = None) -> EvalStep:
    """Makes ``step(state, batch) -> sums`` from a task, to wrap in ``Partition.compile``.

    Args:
        task: whose ``eval_fn`` sums over a batch.
        axis_name: the device axis under ``pmap`` or ``shard_map``, None under ``jit``.
    """

    def step(state: TrainState, batch: Batch) -> Metrics:
        sums = task.eval_fn(state.params, state.batch_stats, batch)
        return sums if axis_name is None else lax.psum(sums, axis_name)

    return step


def evaluate(
    step: EvalStep,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    transform: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """Averages a task's sums over all batches: each metric's sum divided by the total count.

    Args:
        step: what ``make_eval_step`` made, compiled.
        state: the training's, or one of a checkpoint.
        batches: of the evaluation split.
        transform: the training step's, params -> params, such as ``WeightStandardization()``;
            applied once, before the first batch.

    Raises:
        ValueError: if the batches hold no valid sample, or the sums are not scalars with a count.
        NonFiniteLossError: if a metric is not finite.

    Example:
        >>> from wsbcn_flax.training import evaluate
        >>> step = lambda state, batch: {"error": batch["wrong"], "count": batch["size"]}
        >>> evaluate(step, None, [{"wrong": 1.0, "size": 4}, {"wrong": 1.0, "size": 1}])
        {'error': 0.4}
    """
    if transform is not None:
        state = dataclasses.replace(state, params=jax.jit(transform)(state.params))
    totals: dict[str, float] = {}
    for sums in [step(state, batch) for batch in batches]:
        for name, value in as_floats(sums).items():
            totals[name] = totals.get(name, 0.0) + value
    if totals and "count" not in totals:
        raise ValueError(
            "A task's eval_fn must return the number of valid samples as count, received sums of "
            f"{', '.join(totals)} alone."
        )
    count = totals.pop("count", 0.0)
    if not count:
        raise ValueError("Evaluation needs at least one valid sample, and the batches held none.")
    return check_evaluation({name: total / count for name, total in totals.items()})


def check_evaluation(metrics: Mapping[str, float], *, where: str = "") -> dict[str, float]:
    """The metrics, all of which must be finite."""
    if bad := non_finite(metrics):
        raise NonFiniteLossError(
            f"Evaluation needs finite metrics, received {bad}{where}. Look for labels outside the "
            "classes and for bad values in the evaluation data; if there are none, the weights or "
            "running statistics have diverged: evaluate an earlier checkpoint."
        )
    return dict(metrics)


def as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics on the host; all of them must be scalars."""
    values = jax.device_get(dict(metrics))
    if shapes := {name: np.shape(value) for name, value in values.items() if np.ndim(value)}:
        raise ValueError(
            f"Metrics must be scalars, received arrays of the shapes {shapes}. Reduce them over "
            "the batch: means in training, sums in evaluation."
        )
    return {name: float(value) for name, value in values.items()}


def non_finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are NaN or infinite."""
    return {name: value for name, value in metrics.items() if not math.isfinite(value)}
