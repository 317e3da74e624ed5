"""Checks of arguments that several operations share."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def check_activation(x: jax.Array, *, caller: str) -> None:
    """Raises unless ``x`` is a non-empty floating-point array [B, ..., C].

    Raises:
        TypeError: For integer, boolean or complex arrays.
        ValueError: For fewer than two axes or an axis of length zero.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{caller} needs floating-point activations, received {x.dtype} of shape {x.shape}. "
            "Convert first, for example images.astype(jnp.float32) / 255."
        )
    if x.ndim < 2:
        raise ValueError(
            f"{caller} needs activations of shape [B, ..., C] (rank 2 or more), received rank "
            f"{x.ndim} with shape {x.shape}. Add a batch axis: x[None]."
        )
    if 0 in x.shape:
        raise ValueError(
            f"{caller} needs at least one element along every axis, received shape {x.shape}. "
            "Drop empty batches before the model."
        )


def check_groups(shape: tuple[int, ...], num_groups: int, *, caller: str) -> None:
    """Raises unless ``num_groups`` divides the channels of [B, ..., C] into groups of values.

    Raises:
        TypeError: If ``num_groups`` is not a whole number.
        ValueError: If it is not positive, does not divide C, or leaves each group one value.
    """
    features = shape[-1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | np.integer):
        raise TypeError(
            f"{caller} needs num_groups to be a whole number, received {num_groups!r}. One channel "
            "to a group is num_groups=C, all channels in one group is num_groups=1."
        )
    if num_groups < 1 or features % num_groups:
        raise ValueError(
            f"{caller} needs num_groups to divide the number of channels, received "
            f"num_groups={num_groups} for {features} channels. Choose num_groups among "
            f"{[g for g in range(1, features + 1) if features % g == 0]}."
        )
    if num_groups * math.prod(shape[:1]) == math.prod(shape):
        raise ValueError(
            f"{caller} needs more than one value in each group of a sample, received "
            f"num_groups={num_groups} for activations of shape {shape}: every output would be the "
            "bias. Choose fewer groups, or normalize before the map is reduced to one position."
        )


def check_mask(mask: jax.Array | None, x: jax.Array, *, caller: str) -> None:
    """Raises ValueError unless a mask broadcasts to ``x`` [B, ..., C] with a last axis of 1."""
    if mask is None:
        return
    fits = mask.ndim == x.ndim and mask.shape[-1] == 1
    if not fits or any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)):
        raise ValueError(
            f"{caller} needs a mask of positions that broadcasts to x with a channel axis of 1, "
            f"received mask {mask.shape} for x {x.shape}. "
            f"A mask of samples is mask.reshape(-1{', 1' * (x.ndim - 1)})."
        )


def full_mask(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Broadcasts a mask, if given, to every position [B, ..., 1], in the statistics' dtype."""
    if mask is None:
        return None
    return jnp.broadcast_to(mask, (*x.shape[:-1], 1)).astype(statistics_dtype(x.dtype))


def check_channels(features: int, *, caller: str, **arrays: jax.Array | None) -> None:
    """Raises ValueError unless each named array, if given, has shape ``[features]``."""
    for name, array in arrays.items():
        if array is not None and array.shape != (features,):
            raise ValueError(
                f"{caller} needs {name} of shape ({features},), one value per channel of x, "
                f"received {array.shape}. Were the parameters made for another width?"
            )


def statistics_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Returns the dtype in which to compute statistics: float32, or float64 for float64."""
    dtype = jnp.dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    return dtype if wide else jnp.dtype(jnp.float32)


def widened(x: jax.typing.ArrayLike) -> jax.Array:
    """Returns an array in the dtype of its statistics, float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(statistics_dtype(x.dtype))


def check_channel_part(
    features: int, num_groups: int, *, scale: jax.Array | None, bias: jax.Array | None
) -> None:
    """Raises ValueError unless scale and bias have one value per group or per channel."""
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and value.shape not in ((features,), (num_groups,)):
            raise ValueError(
                f"The channel part's {name} must have one value per group, ({num_groups},), or per "
                f"channel, ({features},), received shape {value.shape}."
            )
