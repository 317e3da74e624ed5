"""Gradients of one batch, computed in several micro-batches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from wsbcn_flax.ops._checks import widened
from wsbcn_flax.ops._explicit_axes import vary_over, varying_axes
from wsbcn_flax.tasks import Batch, Metrics
from wsbcn_flax.training._sums import pack_vectors

Loop = Literal["auto", "scan", "unroll", "vmap"]
BatchStatsRule = Literal["average", "carry"]


# (params, batch_stats, batch, *, rng) -> (scalar to differentiate, (batch_stats, metrics)).
ScalarLossFn = Callable[..., tuple[jax.Array, tuple[Any, Metrics]]]


class Evaluated(NamedTuple):
    """Results of one pass over a batch.

    Attributes:
        gradients: Gradients of the loss's total; divided by ``metrics["loss"].weight``, they are
            the gradients of its mean.
        batch_stats: Running statistics, averaged over micro-batches or carried through them.
        metrics: ``Mean`` of each metric and of the loss.
    """

    gradients: Any
    batch_stats: Any
    metrics: Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """The division of a batch into micro-batches, and the rule for their running statistics.

    Attributes:
        count: Number K of micro-batches per step and device; must divide the device's batch.
        loop: How micro-batches run. "scan" compiles one micro-batch and loops over it; "unroll"
            compiles K copies. "vmap" runs all of them as one program, each still normalized by
            itself, in the memory of the whole batch. "auto" is "scan" on TPU and GPU. On CPU it is
            "unroll", since XLA's gradient of a convolution inside a loop is many times slower
            there.
        batch_stats: How running statistics are updated. "average" gives each micro-batch the
            statistics from the start of the step and averages the results. With
            ``order="normalize_first"`` the step is then the same for every K. "carry" passes
            statistics from one micro-batch to the next, as if each were a step; this is Algorithm 1
            of the paper taken literally. "vmap" runs in no order and cannot carry.

    Raises:
        ValueError: For a count below one, an unknown option, or "vmap" with "carry".

    Example:
        >>> from wsbcn_flax.training import MicroBatches
        >>> MicroBatches(count=64, loop="vmap").batch_stats
        'average'
    """

    count: int = 1
    loop: Loop = "auto"
    batch_stats: BatchStatsRule = "average"

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1 micro-batch, received {self.count}.")
        if self.loop not in get_args(Loop):
            raise ValueError(f"loop must be one of {get_args(Loop)}, received {self.loop!r}.")
        if self.batch_stats not in get_args(BatchStatsRule):
            raise ValueError(
                f"batch_stats must be one of {get_args(BatchStatsRule)}, "
                f"received {self.batch_stats!r}."
            )
        if self.loop == "vmap" and self.batch_stats == "carry":
            raise ValueError(
                'loop="vmap" runs the micro-batches at once and cannot carry batch_stats from one '
                'to the next. Use loop="scan" or "unroll", or batch_stats="average".'
            )


def split_batch(batch: Batch, count: int) -> Batch:
    """Reshapes every array [B, ...] of the batch to [B / count, count, ...].

    Micro-batch k is ``array[:, k]``, every count-th sample, so that a batch sharded over devices is
    split without moving data between them.

    Raises:
        ValueError: If the batch is empty, its arrays differ in length, or ``count`` does not divide
            that length.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.training import split_batch
        >>> split_batch({"label": jnp.arange(4)}, 2)["label"][:, 0]
        Array([0, 2], dtype=int32)
    """
    shapes = {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(batch)}
    sizes = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "A batch needs arrays with one common, non-empty leading batch axis, received "
            f"{shapes}."
        )
    (size,) = sizes
    if size % count:
        raise ValueError(
            f"The number of micro-batches must divide the batch on each device, received {count} "
            f"micro-batches for a batch of {size}. Choose the count among "
            f"{[k for k in range(1, size + 1) if size % k == 0]}."
        )
    return jax.tree.map(lambda x: x.reshape(size // count, count, *x.shape[1:]), batch)


def evaluate_micro_batches(
    loss_fn: ScalarLossFn,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    *,
    micro_batches: MicroBatches,
    rng: jax.Array,
) -> Evaluated:
    """Computes the gradients, new batch_stats and metrics of the batch."""
    count = micro_batches.count
    if count == 1:
        split_batch(batch, 1)  # Only for its checks.
        return _evaluate(loss_fn, params, batch_stats, batch, rng)
    batches, rngs = split_batch(batch, count), jax.random.split(rng, count)
    if micro_batches.loop == "vmap":
        return _evaluate(_batched(loss_fn), params, batch_stats, batches, rngs)
    return _evaluate_in_turn(loss_fn, params, batch_stats, batches, rngs, micro_batches)


def _evaluate(loss_fn: ScalarLossFn, params, batch_stats, batch, rng) -> Evaluated:
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)
    (_, (new_batch_stats, metrics)), gradients = differentiate(params, batch_stats, batch, rng=rng)
    # In half precision, the sum over micro-batches would lose the gradients of small ones.
    gradients = jax.tree.map(widened, gradients)
    return Evaluated(gradients, new_batch_stats, metrics)


def _batched(loss_fn: ScalarLossFn) -> Callable:
    """Makes the mean loss over micro-batches [B, K, ...], as one program over all of them.

    Differentiating the mean gives one gradient instead of K.
    """

    def batched_loss_fn(params, batch_stats, batches, *, rng):
        one = functools.partial(loss_fn, params, batch_stats)
        outputs = jax.vmap(one, in_axes=1)(batches, rng=rng)  # vmap maps keywords over axis 0.
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), outputs)

    return batched_loss_fn


def _evaluate_in_turn(loss_fn, params, batch_stats, batches, rngs, micro_batches) -> Evaluated:
    carried = micro_batches.batch_stats == "carry"

    def body(carry, inputs):
        total, stats = carry
        # Without this, XLA for TPU (libtpu 0.0.42) gives the images the layout of the whole batch.
        # Padding them for the first convolution of ResNet-50 then took 0.9 of 6.3 ms.
        inputs = lax.optimization_barrier(inputs)
        out = _evaluate(loss_fn, params, stats, *inputs)
        total = jax.tree.map(jnp.add, total, pack_vectors(out)[0])
        return (total, out.batch_stats if carried else stats), None

    inputs = (jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), batches), rngs)
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes = jax.eval_shape(lambda: _evaluate(loss_fn, params, batch_stats, *first))
    zeros, unpack = pack_vectors(
        jax.tree.map(lambda x: vary_over(varying_axes(x), jnp.zeros(x.shape, x.dtype)), shapes)
    )
    if carried:
        batch_stats = jax.tree.map(
            lambda x, new: vary_over(varying_axes(new), x), batch_stats, shapes.batch_stats
        )
    (total, stats), _ = lax.scan(body, (zeros, batch_stats), inputs, unroll=_unrolls(micro_batches))
    total = unpack(total)
    if not carried:
        stats = jax.tree.map(lambda x: x / micro_batches.count, total.batch_stats)
    return total._replace(batch_stats=stats)


def _unrolls(micro_batches: MicroBatches) -> bool:
    if micro_batches.loop == "auto":
        return jax.default_backend() == "cpu"
    return micro_batches.loop == "unroll"
