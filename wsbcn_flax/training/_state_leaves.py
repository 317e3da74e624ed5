"""The arrays of a state: their names, checksums and placement on devices."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsbcn_flax.training.processes import place


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns arrays, or shapes of a template, by their paths; raises TypeError for other leaves.

    It also raises TypeError for a NumPy array of a dtype that JAX cannot hold.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"every leaf must have its own path; there are two {name}")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic) or (
            isinstance(leaf, np.ma.MaskedArray)
        ):
            raise TypeError(
                f"every leaf must be a JAX or NumPy array; {name} is a {type(leaf).__name__}: "
                "jnp.asarray may make it one"
            )
        if isinstance(leaf, np.ndarray | np.generic):
            _check_numpy(name, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is a typed PRNG key: keep jax.random.key_data(key) instead")
        leaves[name] = leaf
    return leaves


def fingerprint(array: np.ndarray) -> list[Any]:
    """Returns an array's dtype, shape and checksum as JSON values."""
    data = np.asarray(array).reshape(-1).view(np.uint8).data
    return [array.dtype.name, list(array.shape), zlib.crc32(data)]


def place_like(array: np.ndarray, like: Any) -> jax.Array:
    """Places the array where ``like`` is, an array or a `jax.ShapeDtypeStruct`.

    For a NumPy array, and for a shape without a sharding, that is the default device.
    """
    # Uncommitted arrays must stay uncommitted, so that jit may move them to other devices.
    committed = getattr(like, "committed", True)
    sharding = getattr(like, "sharding", None) if committed else None
    placed = jax.device_put(array) if sharding is None else place(array, sharding)
    if placed.dtype != array.dtype:
        raise TypeError(f"restoring {array.dtype} needs jax.enable_x64(True)")
    return placed


def _check_numpy(name: str, dtype: np.dtype) -> None:
    try:
        held = jax.typeof(np.zeros((), dtype)).dtype
    except TypeError:
        raise TypeError(f"{name} is a NumPy array of {dtype}, which JAX cannot hold") from None
    if held != dtype:
        raise TypeError(
            f"{name} is a NumPy array of {dtype}, which JAX holds only with jax.enable_x64(True); "
            f"astype(np.{held}) makes it one that it holds"
        )
