"""Weighted means that add up exactly over micro-batches, devices and batches."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from wsbcn_flax.ops._checks import statistics_dtype


@struct.dataclass
class Mean:
    """A weighted mean that is not divided yet: ``total / weight``.

    Sums of totals and of weights stay exact however samples are split, where a mean of means is
    not: padding, ignored pixels and counts may differ between micro-batches and devices. A task
    returns it as a metric, and as a loss whose weight varies; whoever adds the parts divides once.

    Attributes:
        total: Weighted sum of the values; a scalar, or an array such as a [K, K] confusion matrix.
        weight: Sum of the weights; a scalar, or an array of the shape of ``total``.

    Example:
        >>> import jax.numpy as jnp
        >>> from wsbcn_flax.tasks import Mean
        >>> one = Mean.of(jnp.array([1.0, 3.0]), weight=jnp.array([1.0, 0.0]))
        >>> other = Mean.of(jnp.array([5.0]))
        >>> float((one + other).divide())
        3.0
    """

    total: Any
    weight: Any

    @classmethod
    def of(cls, values: jax.Array, *, weight: jax.Array | None = None) -> "Mean":
        """Sums values with their weights, in float32 or wider.

        Args:
            values: One value for each sample, pixel or other unit; any shape.
            weight: Weights of the shape of ``values``, not negative; 1 by default. Where a weight
                is zero the value may be anything, NaN included.

        Raises:
            ValueError: If the shapes differ.
        """
        values = jnp.asarray(values)
        values = values.astype(statistics_dtype(values.dtype))
        if weight is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))
        weight = jnp.asarray(weight, values.dtype)
        if weight.shape != values.shape:
            raise ValueError(
                f"Every value must have its weight, received values of shape {values.shape} and "
                f"weights of shape {weight.shape}. Broadcast the weights first."
            )
        # A selection, since zero times NaN is NaN.
        products = jnp.where(weight == 0, 0, values) * weight
        return cls(jnp.sum(products), jnp.sum(weight))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def divide(self) -> Any:
        """Returns the mean; zero where the weight is zero."""
        empty = self.weight == 0
        return jnp.where(empty, 0, self.total / jnp.where(empty, 1, self.weight))
