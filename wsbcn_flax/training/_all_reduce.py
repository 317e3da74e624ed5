"""The one all-reduce of a training step."""

from typing import Any

import jax
from jax import flatten_util, lax


def sum_over_devices(tree: Any, axis_name: str) -> Any:
    """Adds every array up over the devices of an axis, in one all-reduce.

    Scalars and vectors (scales, biases, statistics, metrics) travel as one vector: XLA combines
    some hundred arrays at most into one all-reduce, and a deep network has more.
    """
    leaves, structure = jax.tree.flatten(tree)
    large = [leaf for leaf in leaves if leaf.ndim > 1]
    vector, unpack = flatten_util.ravel_pytree([leaf for leaf in leaves if leaf.ndim < 2])
    large, vector = lax.psum((large, vector), axis_name)
    small = iter(unpack(vector))
    large = iter(large)
    sums = [next(large) if leaf.ndim > 1 else next(small) for leaf in leaves]
    return jax.tree.unflatten(structure, sums)
