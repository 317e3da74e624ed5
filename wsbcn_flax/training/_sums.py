"""Sums of trees of arrays: over devices, in one all-reduce, and over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
from jax import flatten_util, lax

from wsbcn_flax.ops._explicit_axes import vary_over, varying_axes


def pack_vectors(tree: Any) -> tuple[tuple[list[jax.Array], jax.Array], Callable[..., Any]]:
    """Returns the arrays of rank 2 and more, all others as one vector, and the inverse function.

    A deep network has hundreds of scales, biases and statistics. Adding them up separately takes an
    operation for each, and XLA combines at most about a hundred arrays into one all-reduce.
    """
    leaves, structure = jax.tree.flatten(tree)
    large = [leaf for leaf in leaves if leaf.ndim > 1]
    vector, unravel = flatten_util.ravel_pytree([leaf for leaf in leaves if leaf.ndim < 2])
    is_large = [leaf.ndim > 1 for leaf in leaves]

    def unpack(packed: tuple[list[jax.Array], jax.Array]) -> Any:
        large, small = iter(packed[0]), iter(unravel(packed[1]))
        return jax.tree.unflatten(structure, [next(large if of else small) for of in is_large])

    return (large, vector), unpack


def on_each_device(tree: Any, axis_name: Any) -> Any:
    """Marks arrays as different on each device of an axis, if ``shard_map`` keeps such marks.

    With its ``check_vma`` (the default), JAX itself adds up the gradients of arrays that are the
    same on all devices. ``sum_over_devices`` would then add them up once more.
    """
    axes = varying_axes(lax.axis_index(axis_name))  # Without check_vma nothing is marked.
    return jax.tree.map(lambda leaf: vary_over(axes, leaf), tree)


def sum_over_devices(tree: Any, axis_name: str) -> Any:
    """Adds every array up over the devices of an axis, in one all-reduce."""
    packed, unpack = pack_vectors(tree)
    return unpack(lax.psum(packed, axis_name))
