"""Operations on arrays that are sharded over a mesh."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def devices_that_share_arrays() -> int:
    """Returns the number of devices over which ``jit`` spreads arrays under the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh.auto_axes)


def with_automatic_axes(function: Callable[..., Any], arrays: tuple[Any, ...], like: Any) -> Any:
    """Calls ``function(*arrays)`` and treats explicit mesh axes as automatic ones.

    Under explicit axes (``jax.make_mesh``'s default) each slice and reshape would have to state a
    sharding. The shardings of the statistics depend on what is sharded: batch, positions or
    channels. XLA finds these shardings by itself; only those of the outputs are stated.

    Args:
        function: Function that maps the arrays to outputs shaped like ``like``.
        arrays: Arguments of ``function``; the first decides whether there are explicit axes.
        like: Pytree of arrays whose shardings the outputs take.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    if not mesh.explicit_axes:
        return function(*arrays)

    def sharding(array):
        own = jax.typeof(array).sharding
        # Constants have no mesh.
        return own if own.mesh.axis_names else NamedSharding(mesh, PartitionSpec())

    automatic = jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=jax.tree.map(sharding, like)
    )
    return automatic(*arrays)


def varying_axes(array: Any) -> frozenset[Any]:
    """Returns the device axes of a ``shard_map`` over which an array, or its shape, varies."""
    aval = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    return aval.manual_axis_type.varying if aval.manual_axis_type else frozenset()


def vary_over(axes: frozenset[Any], array: jax.Array) -> jax.Array:
    """Marks an array as varying over device axes of a ``shard_map``, as its ``check_vma`` needs."""
    missing = tuple(axes - varying_axes(array))
    return lax.pcast(array, missing, to="varying") if missing else array
