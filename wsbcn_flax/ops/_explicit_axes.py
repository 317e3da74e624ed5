"""Operations on arrays that are sharded over a mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def devices_that_share_arrays() -> int:
    """The number of devices over which ``jit`` spreads the arrays seen here."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh.auto_axes)


def with_automatic_axes(function: Callable[..., Any], arrays: tuple[Any, ...], like: Any) -> Any:
    """Calls ``function(*arrays)`` with explicit mesh axes as automatic ones.

    Under explicit axes (``jax.make_mesh``'s default) each slice and reshape would have to state a
    sharding, and those of the statistics depend on what is sharded: batch, positions or channels.
    XLA finds them by itself; only the outputs are stated.

    Args:
        function: from arrays to outputs shaped like ``like``.
        arrays: its arguments, the first of which decides whether there are explicit axes.
        like: a pytree of arrays, whose shardings the outputs take.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if not mesh.explicit_axes:
        return function(*arrays)

    def sharding(array):
        own = jax.typeof(array).sharding
        # Constants are on no mesh.
        return own if own.mesh.axis_names else NamedSharding(mesh, PartitionSpec())

    return jax.sharding.auto_axes(function, out_sharding=jax.tree.map(sharding, like))(*arrays)
