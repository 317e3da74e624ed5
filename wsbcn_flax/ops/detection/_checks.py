"""Checks of arguments that several operations share."""

import jax
import jax.numpy as jnp

from wsbcn_flax.ops._checks import statistics_dtype


def as_boxes(boxes: jax.typing.ArrayLike, name: str, *, rank: int | None = None) -> jax.Array:
    """Converts boxes [..., 4] to float32 or wider.

    Raises:
        ValueError: If the last axis is not 4, or the rank is not the given one.
    """
    boxes = jnp.asarray(boxes)
    if boxes.shape[-1:] != (4,) or rank not in (None, boxes.ndim):
        shape = "[..., 4]" if rank is None else f"[{'N, ' * (rank - 1)}4]"
        raise ValueError(
            f"{name} must have shape {shape}, received {boxes.shape}. Map over further axes with "
            "jax.vmap."
        )
    return boxes.astype(statistics_dtype(boxes.dtype))


def as_valid(valid: jax.typing.ArrayLike | None, shape: tuple[int, ...], name: str) -> jax.Array:
    """Returns a boolean mask of the given shape; all true for None.

    Raises:
        ValueError: If the mask has another shape.
    """
    if valid is None:
        return jnp.ones(shape, bool)
    valid = jnp.asarray(valid, bool)
    if valid.shape != shape:
        raise ValueError(
            f"{name} must hold one flag for each row, of shape {shape}, received {valid.shape}."
        )
    return valid
