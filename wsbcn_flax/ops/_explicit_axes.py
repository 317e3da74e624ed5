"""Operations on arrays whose type names the mesh axes that they are sharded over."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


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
