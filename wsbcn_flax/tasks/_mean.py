"""Weighted means that add up exactly over micro-batches, devices and batches."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from wsbcn_flax.ops._checks import widened


@struct.dataclass
class Mean:
    """A weighted mean that is not divided yet: ``total / weight``.

    Padding, ignored pixels and counts may differ between micro-batches and devices. Sums of totals
    and of weights stay exact however samples are split, but a mean of means does not. A task
    returns a ``Mean`` as a metric, and as a loss whose weight varies. After the parts are added up,
    ``divide`` is called once.

    Attributes:
        total: Weighted sum of the values; a scalar, or an array such as a [K, K] confusion matrix.
        weight: Sum of the weights; a scalar, or an array of the same shape as ``total``.

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
            weight: Weights of the same shape as ``values``, not negative; 1 by default. Where a
                weight is zero, the value may be anything, even NaN.

        Raises:
            ValueError: If the shapes differ.
        """
        values = widened(values)
        if weight is None:
            return cls(jnp.sum(values), jnp.asarray(values.size, values.dtype))
        weight = jnp.asarray(weight, values.dtype)
        if weight.shape != values.shape:
            raise ValueError(
                f"Every value must have its weight, received values of shape {values.shape} and "
                f"weights of shape {weight.shape}. Broadcast the weights first."
            )
        # Zero times NaN is NaN, so values are selected and not only multiplied.
        products = jnp.where(weight == 0, 0, values) * weight
        return cls(jnp.sum(products), jnp.sum(weight))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def divide(self) -> Any:
        """Returns the mean; zero where the weight is zero."""
        empty = self.weight == 0
        return jnp.where(empty, 0, self.total / jnp.where(empty, 1, self.weight))
