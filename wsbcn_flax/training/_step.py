"""The training step: a pure function from state and batch to state and metrics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core import FrozenDict, freeze
from jax import lax

from wsbcn_flax.layers._step_statistics import advance, collected, collecting
from wsbcn_flax.ops._checks import widened
from wsbcn_flax.tasks import Batch, LossFn, Mean, Metrics, Task
from wsbcn_flax.training._loss_scale import scale_loss, skip_if_not_finite
from wsbcn_flax.training._micro_batches import (
    MicroBatches,
    ScalarLossFn,
    evaluate_micro_batches,
)
from wsbcn_flax.training._optimizer import path_of
from wsbcn_flax.training._state import TrainState
from wsbcn_flax.training._sums import on_each_device, sum_over_devices
from wsbcn_flax.transforms import WeightStandardization

_ONE = MicroBatches()
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""A training step, as returned by ``make_train_step``."""


def make_train_step(
    task: Task | LossFn,
    optimizer: optax.GradientTransformation,
    *,
    transform: Callable[[Any], Any] | None = None,
    kernel_dtype: jax.typing.DTypeLike | None = None,
    micro_batches: MicroBatches = _ONE,
    axis_name: str | None = None,
    reduce_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> TrainStep:
    """Makes a step that accumulates micro-batches, reduces once, and updates once.

    The step applies ``transform`` to the parameters once. It accumulates gradients with respect to
    the transformed parameters over all micro-batches. It adds up gradients, batch_stats and metrics
    over devices in one all-reduce, and pulls the gradient back through the transform once.

    Losses and metrics may be ``Mean``s, whose totals and weights are added up and divided once. The
    step then equals that of the whole batch even if the weights of its parts differ.

    If the state has a ``loss_scale``, the scaled loss is differentiated. A step whose gradients are
    not finite is skipped, except that its number counts, and the scale adapts.

    Args:
        task: Task to train, or a loss function ``(params, batch_stats, batch, *, rng) -> (loss,
            (batch_stats, metrics))``. Losses and metrics are means over the batch.
        optimizer: Any optax transformation; it receives the loss as ``value``, which some need.
        transform: Function params -> params, such as ``WeightStandardization()``; None for the
            identity.
        kernel_dtype: Dtype the model's convolutions compute in, if narrower than the parameters.
            Leaves named ``kernel`` of rank 3 or more are then rounded to it once a step, after
            ``transform``, instead of at each use; their gradients accumulate in float32. The
            results are the same, and less memory is moved. None leaves rounding to the layers.
        micro_batches: Number of micro-batches, and how they run.
        axis_name: Device axis under ``pmap`` or ``shard_map``; None under ``jit``.
        reduce_dtype: Dtype in which gradients of rank 2 and more are added up over devices; None
            keeps their own dtype. bfloat16 halves the bytes to send, in a second all-reduce beside
            that of the other arrays. It rounds each device's gradient, so the step depends on the
            number of devices to that accuracy. Needs ``axis_name``.
        seed: Seed of the random numbers (dropout) that the loss receives, distinct for each step,
            device and micro-batch.

    Returns:
        ``step(state, batch) -> (state, metrics)``, to wrap in ``Partition.compile`` or ``jax.jit``.
        The metrics are those of the loss function, with ``loss`` and ``grad_norm``. If the loss is
        scaled, they include ``loss_scale`` and ``skipped``, which is 1 for a skipped step.

    Raises:
        TypeError: For a model in place of a task.
        ValueError: For ``reduce_dtype`` without ``axis_name``. When traced, for an empty batch or
            one that the micro-batches do not divide.
        AssertionError: When traced, if the update changes a shape or dtype of the state, since the
            next step would then compile again.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from wsbcn_flax.training import MicroBatches, TrainState, make_train_step
        >>> def loss_fn(params, batch_stats, batch, *, rng):
        ...     loss = jnp.mean((batch["x"] * params["w"] - batch["y"]) ** 2)
        ...     return loss, (batch_stats, {})
        >>> optimizer = optax.sgd(0.1)
        >>> step = jax.jit(make_train_step(loss_fn, optimizer, micro_batches=MicroBatches(count=2)))
        >>> state = TrainState.create({"params": {"w": jnp.zeros(())}}, optimizer)
        >>> state, metrics = step(state, {"x": jnp.ones(4), "y": jnp.ones(4)})
        >>> float(metrics["loss"]), round(float(state.params["w"]), 3)
        (1.0, 0.2)
    """
    if isinstance(task, nn.Module | nnx.Module):
        raise TypeError(
            "task must be a Task or a loss function, received a model. Wrap it, as in "
            f"Classification(model={type(task).__name__}(...))."
        )
    if reduce_dtype is not None and axis_name is None:
        raise ValueError(
            "reduce_dtype is for a step that reduces its gradients itself, received "
            f"{jnp.dtype(reduce_dtype)} without axis_name. Pass the device axis of shard_map or "
            "pmap; under jit XLA chooses."
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            rng = jax.random.fold_in(rng, lax.axis_index(axis_name))
        transformed, pull_back = (
            (state.params, lambda gradients: (gradients,))
            if transform is None
            else jax.vjp(transform, state.params)
        )
        params = transformed
        if kernel_dtype is not None:
            if isinstance(transform, WeightStandardization):
                # Not `transformed`, rounded: the TPU kernel writes its output in a single dtype.
                params = dataclasses.replace(transform, dtype=kernel_dtype)(state.params)
            params = _round(params, kernel_dtype, like=transformed)
        if axis_name is not None:
            params = on_each_device(params, axis_name)
        loss = _in_means(_loss_fn(task, state))
        if micro_batches.batch_stats == "average":
            loss = _adds_calls_up(loss)
        if state.loss_scale is not None:
            loss = scale_loss(loss, state.loss_scale)
        out = evaluate_micro_batches(
            loss, params, state.batch_stats, batch, micro_batches=micro_batches, rng=rng
        )
        if reduce_dtype is not None:
            narrow = functools.partial(_narrow, dtype=reduce_dtype)
            out = out._replace(gradients=jax.tree.map(narrow, out.gradients))
        if axis_name is not None:
            out = sum_over_devices(out, axis_name)
            mean = jax.tree.map(lambda x: x / lax.axis_size(axis_name), out.batch_stats)
            out = out._replace(batch_stats=mean)
        with jax.named_scope("statistics"):
            batch_stats = advance(state.batch_stats, out.batch_stats)
        if isinstance(state.batch_stats, FrozenDict):
            batch_stats = freeze(batch_stats)
        # In two divisions: the product of weight and scale may not be finite.
        totals, weight = out.gradients, out.metrics["loss"].weight
        if state.loss_scale is not None:
            scale = state.loss_scale.scale
            totals = jax.tree.map(lambda g: g / scale, totals)
        gradients = _mean_gradients(totals, weight, pull_back, like=transformed)
        metrics = {name: mean.divide() for name, mean in out.metrics.items()}
        metrics["grad_norm"] = optax.tree.norm(jax.tree.map(widened, gradients))
        with jax.named_scope("optimizer"):
            update = optax.with_extra_args_support(optimizer).update
            updates, opt_state = update(
                gradients, state.opt_state, state.params, value=metrics["loss"]
            )
            new_params = optax.apply_updates(state.params, updates)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=new_params,
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        after_update = getattr(task, "after_update", lambda state: state.extra)
        new_state = dataclasses.replace(new_state, extra=after_update(new_state))
        if state.loss_scale is not None:
            new_state, metrics = skip_if_not_finite(state, new_state, metrics)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
        return new_state, metrics

    return step


def _mean_gradients(
    totals: Any, weight: jax.Array, pull_back: Callable[[Any], tuple[Any]], *, like: Any
) -> Any:
    """Pulls back the gradients of a mean, given the gradients of its total in float32 or wider.

    The pull-back is linear, so the division follows it, fused with the update. A division before it
    would write the gradients to memory once more, since the TPU kernel of the pull-back reads
    arrays from memory. Half-precision gradients are divided first, since totals might overflow.
    """

    def divide(gradients: Any, like: Any) -> Any:
        return jax.tree.map(lambda g, p: Mean(g, weight).divide().astype(p.dtype), gradients, like)

    leaves = zip(jax.tree.leaves(totals), jax.tree.leaves(like), strict=True)
    if any(g.dtype != p.dtype for g, p in leaves):
        return pull_back(divide(totals, like))[0]
    (totals,) = pull_back(totals)
    return divide(totals, totals)


def _loss_fn(task: Any, state: TrainState) -> LossFn:
    """Returns the loss function, with the task's ``extra`` bound."""
    return functools.partial(task.loss, extra=state.extra) if hasattr(task, "loss") else task


def _in_means(loss_fn: LossFn) -> ScalarLossFn:
    """Makes a loss return its total, and loss and metrics as ``Mean``s (of weight 1 if plain)."""

    def total_loss_fn(params, batch_stats, batch, *, rng):
        loss, (batch_stats, metrics) = loss_fn(params, batch_stats, batch, rng=rng)
        means = {name: _mean(value) for name, value in {**metrics, "loss": loss}.items()}
        return means["loss"].total, (batch_stats, means)

    return total_loss_fn


def _mean(value: Any) -> Mean:
    """Returns a loss or metric as a ``Mean`` in float32 or wider, to be added up."""
    value = jax.tree.map(widened, value)
    return value if isinstance(value, Mean) else Mean(value, jnp.ones_like(value))


def _adds_calls_up(loss_fn: ScalarLossFn) -> ScalarLossFn:
    """Makes a loss return sums in batch_stats, to average and then to pass to ``advance``."""

    def adding_loss_fn(params, batch_stats, batch, *, rng):
        given = collecting(batch_stats)
        loss, (returned, means) = loss_fn(params, given, batch, rng=rng)
        return loss, (collected(given, returned), means)

    return adding_loss_fn


def _narrow(gradient: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds a gradient to ``dtype``, except vectors, which travel with statistics and metrics."""
    return gradient.astype(dtype) if gradient.ndim > 1 else gradient


def _round(params: Any, dtype: jax.typing.DTypeLike, *, like: Any) -> Any:
    """Rounds convolution kernels to ``dtype``, once, and writes them to memory.

    Other parameters are those of ``like``, whose kernels are not rounded yet.
    """

    def rounded(path, array, wide):
        is_kernel = path_of(path).rpartition("/")[2] == "kernel" and wide.ndim > 2
        floating = jnp.issubdtype(wide.dtype, jnp.floating)
        if not is_kernel or not floating or jnp.finfo(wide.dtype).bits <= jnp.finfo(dtype).bits:
            return wide
        # Without this, XLA repeats the kernel's computation, in its own dtype, at each use.
        return lax.optimization_barrier(array.astype(dtype))

    return jax.tree_util.tree_map_with_path(rounded, params, like)
