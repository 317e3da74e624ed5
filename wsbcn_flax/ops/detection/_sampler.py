"""Random samples of a fixed number of positives and negatives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Samples(NamedTuple):
    """Sampled references in a fixed number of slots, positives first.

    Attributes:
        index: Sampled reference of each slot, [size], int32; 0 in empty slots.
        positive: Flags [size] of slots that hold a positive.
        valid: Flags [size] of slots that are not empty.
    """

    index: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # the field's own name
    positive: jax.Array
    valid: jax.Array


def sample_matches(
    key: jax.Array, positive: jax.Array, negative: jax.Array, *, size: int, max_positives: int
) -> Samples:
    """Samples positives and fills the remaining slots with negatives.

    It draws min(positives, ``max_positives``) positives and then as many negatives as fit, each
    without replacement and with equal chances. The counts are exact. Positives lie in the first
    ``max_positives`` slots.

    Args:
        key: Random key of this image; fold the image's index into the key of the step.
        positive: Flags [A] of positives.
        negative: Flags [A] of negatives, none of which is positive.
        size: Number of slots.
        max_positives: Largest number of positives, up to ``size``.

    Returns:
        Indices and flags of the slots, [size] each.

    Raises:
        ValueError: If the shapes differ, or ``max_positives`` is not from 0 to ``size``.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.ops.detection import sample_matches
        >>> positive = jnp.array([False, True, False, False, True, False])
        >>> key = jax.random.key(0)
        >>> samples = sample_matches(key, positive, ~positive, size=4, max_positives=1)
        >>> samples.positive.tolist(), samples.valid.tolist()
        ([True, False, False, False], [True, True, True, True])
    """
    positive, negative = jnp.asarray(positive, bool), jnp.asarray(negative, bool)
    if positive.ndim != 1 or positive.shape != negative.shape:
        raise ValueError(
            "positive and negative must be flags [A], received shapes "
            f"{positive.shape} and {negative.shape}. Map over images with jax.vmap."
        )
    if not 0 <= max_positives <= size:
        raise ValueError(f"max_positives must be from 0 to {size}, received {max_positives}.")
    count = len(positive)
    # Ranks lie in (0, 1]; 0 stands for references that may not be drawn.
    rank = 1 - jax.random.uniform(key, (count,))
    drawn, index = lax.top_k(jnp.where(positive, rank, 0), min(max_positives, count))
    chosen = jnp.zeros(count, bool).at[index].set(drawn > 0)
    value = jnp.where(chosen, 1 + rank, jnp.where(negative, rank, 0))
    value, index = lax.top_k(value, min(size, count))
    value, index = (jnp.pad(x, (0, size - len(x))) for x in (value, index))
    valid = value > 0
    return Samples(jnp.where(valid, index, 0).astype(jnp.int32), value > 1, valid)
