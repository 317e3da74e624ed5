"""Running statistics of a training step, added up over calls, micro-batches and devices.

A step reads the statistics as they stood when it began. ``collecting`` gives every
``BatchChannelNorm`` a place for sums over its calls. Each call adds the statistics that it alone
would make, weighted by the fraction of positions that count. These sums may be averaged over
micro-batches and devices of equal size, as gradients are. ``advance`` then turns them into the new
statistics. So it does not matter how the activations that a layer normalizes in a step are split.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from wsbcn_flax.ops import RunningStats
from wsbcn_flax.ops._checks import statistics_dtype

CALLS = "calls"  # Name of a layer's sums in the step's batch_stats.


class CallSums(NamedTuple):
    """Sums over the calls of one layer.

    Attributes:
        mean: Sum [C] of the new running means, each times its call's weight.
        var: Sum [C] of the new running variances, each times its call's weight.
        weight: Sum [] of the weights. A call's weight is the fraction of unmasked positions.
    """

    mean: jax.Array
    var: jax.Array
    weight: jax.Array

    @classmethod
    def zero(cls, stats: RunningStats) -> "CallSums":
        """Returns the sums before the first call."""
        mean, var, count = stats
        # The weights are fractions, also if the count is an integer.
        return cls(
            jnp.zeros_like(mean),
            jnp.zeros_like(var),
            jnp.zeros_like(count, statistics_dtype(mean.dtype)),
        )

    def add(self, new: RunningStats, mask: jax.Array | None) -> "CallSums":
        """Returns the sums after a call that alone would have made the statistics ``new``."""
        dtype = self.weight.dtype
        weight = jnp.ones((), dtype) if mask is None else jnp.mean(mask, dtype=dtype)
        return CallSums(
            self.mean + weight * new.mean, self.var + weight * new.var, self.weight + weight
        )

    def statistics(self, before: RunningStats) -> RunningStats:
        """Returns the statistics after all calls, which together are one update."""
        any_valid = self.weight > 0
        # Layers stacked by nn.vmap or nn.scan have a weight each.
        weight = jnp.where(any_valid, self.weight, 1)
        weight = weight.reshape(weight.shape + (1,) * (self.mean.ndim - weight.ndim))
        moved = jnp.broadcast_to(any_valid.reshape(weight.shape), self.mean.shape)
        return RunningStats(
            jnp.where(moved, self.mean / weight, before.mean),
            jnp.where(moved, self.var / weight, before.var),
            before.count + any_valid.astype(before.count.dtype),
        )


def collecting(batch_stats: Any) -> Any:
    """Returns the batch_stats with zero sums beside every ``BatchChannelNorm``'s statistics."""
    leaves = _flatten(batch_stats)
    for layer in _layers(leaves):
        leaves[*layer, CALLS] = CallSums.zero(_statistics(leaves, layer))
    return traverse_util.unflatten_dict(leaves)


def collected(given: Any, batch_stats: Any) -> Any:
    """Selects the part of a loss function's batch_stats that is to be averaged.

    For a layer that added to its sums, this is the sums alone. For a third-party module that keeps
    a mean, a var and a count but does not use the sums, it is the statistics.

    Args:
        given: Result of ``collecting``, which the loss function received.
        batch_stats: Collection that the loss function returned.
    """
    old, leaves = _flatten(given), _flatten(batch_stats)
    for layer in _layers(leaves):
        sums = (*layer, CALLS)
        if sums not in leaves:
            continue
        untouched = leaves[sums].weight is old[sums].weight
        moved = leaves[*layer, "mean"] is not old[*layer, "mean"]
        for path in [sums] if untouched and moved else [(*layer, n) for n in RunningStats._fields]:
            del leaves[path]
    return traverse_util.unflatten_dict(leaves)


def advance(before: Any, sums: Any) -> Any:
    """Returns the batch_stats after the step, from those before it and the ``collected`` ones."""
    old, new = _flatten(before), _flatten(sums)
    for path in [path for path in new if path[-1] == CALLS]:
        layer = path[:-1]
        after = new.pop(path).statistics(_statistics(old, layer))
        new |= {(*layer, name): value for name, value in after._asdict().items()}
    return traverse_util.unflatten_dict(new)


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(tree, keep_empty_nodes=True)


def _layers(leaves: Mapping[tuple[str, ...], Any]) -> list[tuple[str, ...]]:
    """Returns the paths under which there are a mean, a var and a count."""
    paths = [path[:-1] for path in leaves if path[-1:] == ("count",)]
    return [path for path in paths if all((*path, name) in leaves for name in RunningStats._fields)]


def _statistics(leaves: Mapping[tuple[str, ...], Any], layer: tuple[str, ...]) -> RunningStats:
    return RunningStats(*(leaves[*layer, name] for name in RunningStats._fields))
