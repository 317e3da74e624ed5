"""Evaluation over a full set, the last partial batch included."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax

from wsbcn_flax.training._micro_batches import Batch, Metrics
from wsbcn_flax.training._state import TrainState
from wsbcn_flax.training._tasks import Task

EvalStep = Callable[[TrainState, Batch], Metrics]


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
        ValueError: if the batches hold no valid sample.

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
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    count = totals.pop("count", 0.0)
    if not count:
        raise ValueError("Evaluation needs at least one valid sample, and the batches held none.")
    return {name: total / count for name, total in totals.items()}
