"""The arrays of a state: their names, their checksums and their places on devices."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsbcn_flax.training._processes import place


def named_leaves(tree: Any) -> dict[str, Any]:
    """The arrays, or the shapes of a template, by their paths; anything else is refused."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in leaves:
            raise ValueError(f"every leaf must have its own path; there are two {name}")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"every leaf must be a JAX array; {name} is a {type(leaf).__name__}")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is a typed PRNG key: keep jax.random.key_data(key) instead")
        leaves[name] = leaf
    return leaves


def fingerprint(array: np.ndarray) -> list[Any]:
    """An array's dtype, shape and checksum, as JSON keeps them."""
    data = np.asarray(array).reshape(-1).view(np.uint8).data
    return [array.dtype.name, list(array.shape), zlib.crc32(data)]


def place_like(array: np.ndarray, like: Any) -> jax.Array:
    """The array, where ``like`` is: an array or a `jax.ShapeDtypeStruct`."""
    # Uncommitted arrays must stay free to join arrays on other devices under jit.
    sharding = like.sharding if getattr(like, "committed", True) else None
    placed = jax.device_put(array) if sharding is None else place(array, sharding)
    if placed.dtype != array.dtype:
        raise TypeError(f"restoring {array.dtype} needs jax.enable_x64(True)")
    return placed
